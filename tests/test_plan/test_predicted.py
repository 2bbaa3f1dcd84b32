"""The predicted step: what it is made of, and that the default dispatcher's is never longer than min-heap's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    AffinityDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    UniformOverlapAlg,
)
from magi_attention.mask import AttnMask, causal, varlen, varlen_block_causal
from magi_attention.plan import build_plan
from magi_attention.plan.cost import CostModel, Heads, Machine, Workload, backward_times, cost_of, forward_times
from magi_attention.plan.predicted import predicted_step, workloads
from magi_attention.plan.workload import cells_at_home

HEADS = Heads(num_heads_q=8, num_heads_kv=2, head_dim=64)


def random_mask(rng: np.random.Generator, total: int) -> AttnMask:
    edges = np.unique(np.concatenate([[0, total], rng.integers(1, total, int(rng.integers(0, 30)))]))
    kind = int(rng.integers(0, 6))
    if kind == 0:
        return causal(total)
    if kind == 1:
        return varlen_block_causal(edges, 64)
    if kind == 2:
        return varlen([0, total], window_size=(int(rng.integers(1, total)), 0))
    if kind == 3:
        return varlen(edges)
    if kind == 4:  # a prefix that all attend, and documents behind it
        half = total // 2
        inner = np.unique(np.concatenate([[half, total], rng.integers(half, total, 3)]))
        pairs = np.stack([inner[:-1], inner[1:]], axis=1).tolist()
        return AttnMask.from_slices(
            [[0, half], *pairs, *pairs],
            [[0, half], *pairs, *([[0, half]] * len(pairs))],
            ["causal"] * (1 + len(pairs)) + ["full"] * len(pairs),
        )
    return varlen(edges, causal=True)


def random_overlap(rng: np.random.Generator) -> OverlapConfig:
    """From machines that only compute to machines that only wait."""
    flops, bandwidth = 1e12, float(10 ** rng.uniform(7, 11))
    cost = Machine(flops, bandwidth, float(10 ** rng.uniform(-9, -5))).cost_model(8, 2, 64)
    return OverlapConfig(
        mode=AttnOverlapMode.DYNAMIC if rng.random() < 0.5 else AttnOverlapMode.STATIC,
        degree=int(rng.integers(1, 4)),
        min_chunk_size=16,
        alg=GreedyOverlapAlg() if rng.random() < 0.5 else UniformOverlapAlg(),
        calc_cost_factor=cost.cell,
        comm_cost_factor=cost.row,
        latency_cost=cost.latency,
    )


@pytest.mark.parametrize("seed", range(40))
def test_never_slower_than_min_heap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = int(rng.choice([1000, 2048, 4096]))
    mask, overlap = random_mask(rng, total), random_overlap(rng)
    num_ranks = int(rng.choice([2, 3, 8, 16, 32]))
    uneven, chunk_size = bool(rng.random() < 0.2), int(rng.choice([8, 16, 32]))
    per_node = 2 if num_ranks % 2 == 0 and rng.random() < 0.3 else None
    cost = cost_of(overlap, HEADS)
    steps = []
    for alg in (AffinityDispatchAlg(), MinHeapDispatchAlg()):
        config = DistAttnConfig(DispatchConfig(chunk_size=chunk_size, uneven_shard=uneven, alg=alg), overlap)
        plan = build_plan(mask, num_ranks, config, heads=HEADS, ranks_per_node=per_node)
        steps.append(predicted_step(plan, HEADS, cost))
    assert steps[0] <= steps[1] * (1 + 2e-9)


def test_both_ends_are_tried() -> None:
    # Where links are slow little is moved; where they are fast areas are as even as min-heap's.
    mask = varlen([0, 100, 900, 1500, 2048, 3000, 4096], causal=True)
    plans = {}
    for bandwidth in (1e7, 1e13):
        cost = Machine(1e12, bandwidth, 0.0).cost_model(8, 2, 64)
        overlap = OverlapConfig(calc_cost_factor=cost.cell, comm_cost_factor=cost.row)
        plans[bandwidth] = build_plan(mask, 8, DistAttnConfig(DispatchConfig(chunk_size=16), overlap))
    heap = build_plan(mask, 8, DistAttnConfig(DispatchConfig(chunk_size=16, alg=MinHeapDispatchAlg())))
    assert plans[1e7].received_rows.sum() < 0.5 * heap.received_rows.sum()
    assert plans[1e7].imbalance > heap.imbalance
    assert plans[1e13].imbalance <= heap.imbalance


def test_costs_left_out_are_those_of_the_heads() -> None:
    assert cost_of(OverlapConfig(), HEADS) == Machine().cost_model(8, 2, 64)
    given = OverlapConfig(calc_cost_factor=2.0, comm_cost_factor=3.0, latency_cost=4.0)
    assert cost_of(given, HEADS) == CostModel(2.0, 3.0, 4.0)
    # The number of stages depends on them: many heads of queries hide what few heads of keys move.
    dynamic = DistAttnConfig(DispatchConfig(chunk_size=512), OverlapConfig(mode=AttnOverlapMode.DYNAMIC))
    chosen = {
        build_plan(causal(1 << 17), 8, dynamic, heads=Heads(num_q, 8, 128)).forward.num_stages for num_q in (8, 256)
    }
    assert len(chosen) == 2


@pytest.mark.parametrize("seed", range(20))
def test_cells_at_home_are_those_of_the_host_stage(seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = int(rng.choice([97, 256, 1000]))
    mask = random_mask(rng, total)
    num_ranks = int(rng.integers(1, 9))
    config = DistAttnConfig(DispatchConfig(chunk_size=int(rng.integers(1, 40))))
    plan = build_plan(mask, num_ranks, config)
    dense = mask.to_dense()
    held = [plan.q_layout.positions(rank) for rank in range(num_ranks)]
    expected = [int(dense[np.ix_(rows[rows < total], rows[rows < total])].sum()) for rows in held]
    assert cells_at_home(mask.bands, plan.q_layout, plan.k_layout).tolist() == expected


@pytest.mark.parametrize("seed", range(10))
def test_workloads_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = DistAttnConfig(DispatchConfig(chunk_size=16), random_overlap(rng))
    plan = build_plan(random_mask(rng, 1024), 4, config, ranks_per_node=2 if seed % 2 else None)
    for work, dealing in zip(
        workloads(plan, HEADS, Machine().cost_model(8, 2, 64)), (plan.forward, plan.backward), strict=True
    ):
        np.testing.assert_allclose(work.host_cells + work.stage_cells.sum(axis=0), plan.areas)
        assert len(work.stage_cells) == dealing.num_stages
        rows = (work.stage_rows + work.stage_between).sum(axis=0)
        assert (rows >= np.maximum(plan.received_rows - plan.rows_between_nodes, 0)).all()


def test_links_of_two_kinds() -> None:
    rows, between = np.array([[10.0]]), np.array([[4.0]])
    cost = CostModel(cell=1, row=1, latency=3, row_between=5, ranks_per_node=2)
    flat = Workload(np.zeros(1), np.zeros((1, 1)), rows, between)
    assert flat.transfers(cost).tolist() == [[3 + 20]]  # both kinds at once, the slower decides
    relayed = dataclasses.replace(flat, relayed=True)
    assert relayed.transfers(cost).tolist() == [[6 + 10 + 20]]  # one behind the other
    assert forward_times(flat, cost).tolist() == [23]
    assert backward_times(flat, cost).tolist() == [46]


def test_between_nodes_once_pays_where_links_between_nodes_are_slow() -> None:
    mask = causal(4096)
    machine = Machine(1e12, 1e11, 0.0, bandwidth_between=1e9, ranks_per_node=4)
    cost = machine.cost_model(8, 2, 64)
    config = DistAttnConfig(DispatchConfig(chunk_size=64))
    each, once = (build_plan(mask, 16, config, ranks_per_node=per_node) for per_node in (None, 4))
    assert predicted_step(once, HEADS, cost) < 0.6 * predicted_step(each, HEADS, cost)
    alike = Machine(1e12, 1e11, 0.0).cost_model(8, 2, 64)
    assert predicted_step(each, HEADS, alike) < predicted_step(once, HEADS, alike)
