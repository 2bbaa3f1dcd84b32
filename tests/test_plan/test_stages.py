"""Stages: DYNAMIC is never predicted slower than one stage, and takes more where they pay."""

from __future__ import annotations

import numpy as np
import pytest

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    DispatchConfig,
    DistAttnConfig,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    UniformOverlapAlg,
)
from magi_attention.mask import AttnMask, causal, varlen
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.cost import Heads, Machine
from magi_attention.plan.query_moves import RowBytes

HEADS = Heads(num_heads_q=4, num_heads_kv=2, head_dim=16)


def plan_for(
    mask: AttnMask,
    machine: Machine,
    num_ranks: int,
    *,
    dynamic: bool,
    greedy: bool,
    chunk_size: int = 8,
    moves: bool = False,
    ranks_per_node: int | None = None,
) -> AttnPlan:
    """Dealt by min-heap, so that stages alone differ."""
    cost = machine.cost_model(HEADS.num_heads_q, HEADS.num_heads_kv, HEADS.head_dim, HEADS.itemsize)
    overlap = OverlapConfig(
        mode=AttnOverlapMode.DYNAMIC if dynamic else AttnOverlapMode.STATIC,
        min_chunk_size=1,
        alg=GreedyOverlapAlg() if greedy else UniformOverlapAlg(),
        calc_cost_factor=cost.cell,
        comm_cost_factor=cost.row,
        latency_cost=cost.latency,
    )
    return build_plan(
        mask,
        num_ranks,
        DistAttnConfig(DispatchConfig(chunk_size=chunk_size, alg=MinHeapDispatchAlg()), overlap),
        heads=HEADS,
        moves_queries=RowBytes.of(HEADS.num_heads_q, HEADS.num_heads_kv, HEADS.head_dim) if moves else None,
        ranks_per_node=ranks_per_node,
    )


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_never_predicted_slower_than_one_stage(seed: int, greedy: bool) -> None:
    rng = np.random.default_rng(seed)
    total, chunk_size = (256, 8) if seed % 2 else (4096, 64)
    edges = np.unique(np.concatenate([[0, total], rng.integers(1, total, 4)]))
    mask = varlen(edges, causal=bool(seed % 3))
    num_ranks = 2 * int(rng.integers(1, 9))
    machine = Machine(flops=1e9, bandwidth=float(10 ** rng.uniform(6, 9)), latency=float(10 ** rng.uniform(-8, -4)))
    moves, per_node = seed % 4 == 2, 2 if seed % 4 == 3 else None
    chosen, one = (
        plan_for(
            mask,
            machine,
            num_ranks,
            dynamic=dynamic,
            greedy=greedy,
            chunk_size=chunk_size,
            moves=moves,
            ranks_per_node=per_node,
        ).report(HEADS, machine)
        for dynamic in (True, False)
    )
    assert chosen.forward <= one.forward * (1 + 1e-9)
    assert chosen.backward <= one.backward * (1 + 1e-9)


def test_some_of_those_move_queries() -> None:
    mask = AttnMask.from_slices([[224, 256]], [[0, 256]], "causal")
    machine = Machine(1e9, 1e6, 1e-8)
    chosen, one = (
        plan_for(mask, machine, 4, dynamic=dynamic, greedy=False, chunk_size=32, moves=True)
        for dynamic in (True, False)
    )
    assert chosen.moved is not None and one.moved is not None
    assert chosen.report(HEADS, machine).step <= one.report(HEADS, machine).step * (1 + 1e-9)


def test_stages_where_they_pay_and_not_where_an_exchange_is_dear() -> None:
    fast, dear = Machine(1e9, 4e7, 1e-9), Machine(1e9, 4e7, 1.0)
    mask = causal(256)
    many = plan_for(mask, fast, 4, dynamic=True, greedy=False)
    assert many.forward.num_stages > 1
    one = plan_for(mask, fast, 4, dynamic=False, greedy=False)
    assert many.report(HEADS, fast).forward < one.report(HEADS, fast).forward
    few = plan_for(mask, dear, 4, dynamic=True, greedy=False)
    assert few.forward.num_stages == few.backward.num_stages == 1


def test_forward_and_backward_choose_for_themselves() -> None:
    seen = {
        (plan.forward.num_stages, plan.backward.num_stages)
        for bandwidth in (1e6, 1e7, 3e7, 1e8)
        for plan in [plan_for(causal(256), Machine(1e9, bandwidth, 1e-7), 4, dynamic=True, greedy=True)]
    }
    assert any(forward != backward for forward, backward in seen)


@pytest.mark.parametrize("greedy", [False, True])
def test_every_degree_delivers_the_same_rows(greedy: bool) -> None:
    mask = varlen([0, 100, 256], causal=True)
    alg = GreedyOverlapAlg() if greedy else UniformOverlapAlg()
    received = set()
    for degree in (1, 2, 3, 7):
        config = DistAttnConfig(DispatchConfig(chunk_size=8), OverlapConfig(degree=degree, min_chunk_size=1, alg=alg))
        plan = build_plan(mask, 4, config)
        assert plan.num_stages == degree
        received.add(tuple(plan.received_rows.tolist()))
    assert len(received) == 1


def test_short_sequences_get_fewer_stages() -> None:
    config = DistAttnConfig(DispatchConfig(chunk_size=8), OverlapConfig(degree=8, min_chunk_size=64))
    plan = build_plan(causal(256), 4, config)
    assert plan.num_stages == max(1, int(plan.received_rows.max()) // 64) < 8
