"""The certificate's numbers, each against a count made another way."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig, SequentialDispatchAlg
from magi_attention.mask import AttnMask
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.cost import Heads, Machine
from magi_attention.plan.query_moves import RowBytes
from magi_attention.plan.report import PlanReport
from magi_attention.testing.plan_check import guest_deliveries, key_deliveries

HEADS = Heads(num_heads_q=4, num_heads_kv=2, head_dim=16, itemsize=2)


def documents(lengths: list[int]) -> AttnMask:
    edges = np.append(0, np.cumsum(lengths)).tolist()
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    return AttnMask.from_slices(ranges, ranges, "causal", edges[-1], edges[-1])


def random_mask(seed: int) -> AttnMask:
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:
        return documents(rng.integers(1, 40, 6).tolist())
    num = int(rng.integers(20, 120))
    q_edges = np.sort(rng.choice(np.arange(1, num), 3, replace=False)).tolist()
    q_ranges = list(zip([0, *q_edges], [*q_edges, num], strict=True))
    k_ranges = [np.sort(rng.integers(0, num + 1, 2)).tolist() for _ in q_ranges]
    return AttnMask.from_slices(q_ranges, k_ranges, rng.integers(0, 4, len(q_ranges)).tolist(), num, num)


def random_plan(seed: int, *, moves: bool = False, nodes: bool = False) -> AttnPlan:
    rng = np.random.default_rng(seed + 1000)
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=int(rng.integers(1, 12))),
        overlap_config=OverlapConfig(degree=int(rng.integers(1, 4)), min_chunk_size=1),
    )
    return build_plan(
        random_mask(seed),
        4 if nodes else int(rng.integers(1, 7)),
        config,
        moves_queries=RowBytes(key=3, query=2) if moves else None,
        ranks_per_node=2 if nodes else None,
    )


def dense_cells(plan: AttnPlan) -> list[np.ndarray]:
    """By rank, ``[rows, num_k]`` of the dense mask: the queries that it holds."""
    dense = plan.mask.to_dense()
    return [
        dense[positions[positions < plan.mask.num_q]]
        for positions in (plan.q_layout.positions(rank) for rank in range(plan.num_ranks))
    ]


@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_counts_against_the_dense_mask(seed: int, nodes: bool) -> None:
    plan = random_plan(seed, nodes=nodes)
    certificate = plan.report(HEADS)
    cells = dense_cells(plan)
    held = [plan.k_layout.positions(rank) for rank in range(plan.num_ranks)]
    demanded = [np.setdiff1d(np.flatnonzero(part.any(axis=0)), own) for part, own in zip(cells, held, strict=True)]
    assert certificate.area == [int(part.sum()) for part in cells]
    assert certificate.rows_received == [len(rows) for rows in demanded]
    assert certificate.rows_demanded == sum(len(rows) for rows in demanded)
    assert certificate.rows_in_excess == 0
    assert certificate.rows_sent == [int(np.isin(np.concatenate(demanded), own).sum()) for own in held]
    assert certificate.bytes_received == [2 * 2 * 16 * 2 * len(rows) for rows in demanded]  # k and v, heads, dim, bytes
    mean = plan.mask.area / plan.num_ranks
    assert certificate.imbalance == pytest.approx(max(certificate.area) / mean if mean else 1.0)
    if nodes:
        of_node = [np.unique(np.concatenate(demanded[first : first + 2])) for first in (0, 2)]
        crossing = [np.setdiff1d(of_node[at], np.concatenate(held[2 * at : 2 * at + 2])) for at in (0, 1)]
        assert certificate.rows_between_nodes == sum(len(rows) for rows in crossing)


def test_rows_between_the_nodes_of_the_machine() -> None:
    # A plan without hierarchy: every rank of a node that needs a row gets it across.
    plan = build_plan(documents([40, 60, 28]), 4, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=8)))
    held = [plan.k_layout.positions(rank) for rank in range(4)]
    demanded = [
        np.setdiff1d(np.flatnonzero(part.any(axis=0)), np.concatenate(held[rank // 2 * 2 : rank // 2 * 2 + 2]))
        for rank, part in enumerate(dense_cells(plan))
    ]
    certificate = plan.report(HEADS, Machine(bandwidth_between=1e9, ranks_per_node=2))
    assert certificate.rows_between_nodes == sum(len(rows) for rows in demanded) > 0
    assert plan.report(HEADS).rows_between_nodes == 0


def test_counting_demand_does_not_look_at_the_transfers() -> None:
    plan = build_plan(documents([64, 64]), 4, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=8)))
    whole = plan.report(HEADS)
    assert whole.rows_demanded > 0
    twice = replace(plan.forward, table=np.concatenate([plan.forward.table, plan.forward.table[:1]]))
    doubled = replace(plan, forward=twice, backward=twice).report(HEADS)
    begin, end = plan.forward.table[0, 3:5]
    assert doubled.rows_demanded == whole.rows_demanded
    assert doubled.rows_in_excess == end - begin > 0


@pytest.mark.parametrize("seed", range(12))
def test_counts_where_queries_move(seed: int) -> None:
    plan = random_plan(seed, moves=True)
    certificate = plan.report(HEADS)
    keys = key_deliveries(plan)
    rows = [sum(len(of_stage[rank]) for of_stage in keys) for rank in range(plan.num_ranks)]
    guests = [len(arrived) for arrived in guest_deliveries(plan)]
    assert certificate.rows_received == rows
    assert certificate.queries_received == guests
    assert sum(certificate.area) == plan.mask.area
    key, query = HEADS.key_bytes, HEADS.query_bytes
    assert certificate.bytes_received == [r * key + g * query for r, g in zip(rows, guests, strict=True)]


def test_some_of_those_plans_move_queries() -> None:
    assert sum(random_plan(seed, moves=True).moved is not None for seed in range(12)) >= 4


@pytest.mark.parametrize("kind", ["plain", "moves", "nodes"])
@pytest.mark.parametrize("seed", range(6))
def test_times_and_timeline(seed: int, kind: str) -> None:
    plan = random_plan(seed, moves=kind == "moves", nodes=kind == "nodes")
    machine = Machine(flops=1e9, bandwidth=1e8, latency=1e-6)
    certificate = plan.report(HEADS, machine)
    assert len(certificate.stage_timeline) == plan.num_ranks
    num_stages = plan.num_stages + (plan.moved is not None)
    for of_rank in certificate.stage_timeline:
        assert len(of_rank) == 2 + 3 * num_stages
        assert of_rank[0] == 0.0
        done = of_rank[1]
        for arrived, begin, end in zip(of_rank[2::3], of_rank[3::3], of_rank[4::3], strict=True):
            assert begin == max(arrived, done)
            assert end >= begin
            done = end
    assert certificate.forward == max(of_rank[-1] for of_rank in certificate.stage_timeline)
    assert certificate.forward <= certificate.forward_without_overlap * (1 + 1e-9)
    assert certificate.backward <= certificate.backward_without_overlap * (1 + 1e-9)
    assert certificate.step == certificate.forward + certificate.backward
    assert 0 <= certificate.efficiency <= 1 + 1e-9


def test_a_timeline_computed_by_hand() -> None:
    # Two ranks, 8 tokens in chunks of 4, in order, full mask: each rank computes 4 x 4 cells at home and 4 x 4 with 4 rows received.
    mask = AttnMask.from_slices([(0, 8)], [(0, 8)], "full", 8, 8)
    config = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=4, alg=SequentialDispatchAlg()))
    plan = build_plan(mask, 2, config)
    # A cell is 2 * (16 + 16) FLOPs for each of 4 heads: 256, 1 s at 256 FLOP/s. A row is 128 bytes: 5 s at 25.6 bytes/s.
    certificate = plan.report(HEADS, Machine(flops=256, bandwidth=25.6, latency=3))
    assert certificate.stage_timeline == [[0, 16, 23, 23, 39]] * 2
    assert certificate.forward == 39
    assert certificate.forward_without_overlap == 16 + 23 + 16
    # Backward: 2.5 times the computing; rows arrive while the host stage computes, and their gradients travel home behind the last stage.
    assert certificate.backward == 2 * 40 + 23
    assert certificate.backward_without_overlap == 2 * 40 + 2 * 23
    assert certificate.efficiency == pytest.approx((32 + 80) / (39 + 103))


def test_alternatives_of_a_full_mask() -> None:
    # Every rank needs everything: nobody can receive fewer rows than a ring, and nothing computes faster than ideal.
    mask = AttnMask.from_slices([(0, 64)], [(0, 64)], "full", 64, 64)
    plan = build_plan(mask, 2, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=8)))
    certificate = plan.report(HEADS)
    ring, gathered, sharded = certificate.alternatives
    assert ring.rows == gathered.rows == plan.ring_rows == sum(certificate.rows_received) == 64
    assert ring.step is not None and gathered.step is not None and sharded.step is not None
    assert ring.step <= gathered.step
    # q, k, v and out of 32 tokens a rank, half the heads of each: 2 * 128 + 128 bytes a token, where a row of keys is 128.
    assert sharded.rows == 2 * 16 * 3
    ideal = certificate.efficiency * certificate.step
    assert all(one.step is not None and one.step >= ideal for one in certificate.alternatives)


def test_alternatives_on_nodes() -> None:
    # Nodes of 2 of 4 ranks, a link between them ten times slower: a ring turns at its speed, a gather crosses with half of each row.
    mask = AttnMask.from_slices([(0, 64)], [(0, 64)], "full", 64, 64)
    plan = build_plan(mask, 4, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=8)))
    row, ideal = 128 / 1e6, 1e-9  # of keys, at a megabyte a second; computing costs nothing
    alike, slow = (
        [one.step for one in plan.report(HEADS, Machine(1e20, 1e6, 0.0, between, nodes)).alternatives]
        for between, nodes in ((None, None), (1e5, 2))
    )
    assert alike[:2] == pytest.approx([3 * 48 * row, 3 * 48 * row], abs=ideal)
    assert slow[:2] == pytest.approx([3 * 48 * row * 10, 3 * (48 * row + 48 * (2 / 3) / 2 * row * 10)], abs=ideal)
    assert slow[2] == pytest.approx(alike[2] * (2 / 3) * 10, abs=ideal)


def test_heads_that_cannot_be_sharded() -> None:
    config = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=8))
    # Four heads of queries, two of keys. On four ranks those of keys are copied: of a rank's 32 tokens, three quarters of q, out, and k, v
    # twice.
    copied = build_plan(documents([64, 64]), 4, config).report(HEADS).alternatives[-1]
    assert copied.step is not None
    assert copied.rows == 4 * int(32 * 0.75 * (2 * 128 + 128 * 2) / 128)
    certificate = build_plan(documents([64, 64]), 8, config).report(HEADS)
    assert certificate.alternatives[-1].step is None
    assert "not possible" in str(certificate)


@pytest.mark.parametrize("kind", ["plain", "moves", "nodes"])
def test_json_and_table(kind: str) -> None:
    plan = random_plan(3, moves=kind == "moves", nodes=kind == "nodes")
    certificate = plan.report(HEADS)
    assert PlanReport.from_json(certificate.to_json()) == certificate
    assert json.loads(certificate.to_json())["step"] == certificate.step
    table = str(certificate).splitlines()
    rows = {int(line.split()[0]): line for line in table[-plan.num_ranks :]}
    for rank in range(plan.num_ranks):
        numbers = [int(word.replace(",", "")) for word in rows[rank].split()[1:4]]
        assert numbers == [
            certificate.area[rank],
            certificate.rows_sent[rank],
            certificate.rows_received[rank],
        ]


def test_a_mask_that_attends_nothing() -> None:
    plan = build_plan(AttnMask(np.empty((0, 6), np.int64), 32, 32), 4)
    certificate = plan.report(HEADS)
    assert certificate.area == [0] * 4
    assert certificate.rows_demanded == certificate.rows_in_excess == 0
    assert certificate.step == 0.0 and certificate.efficiency == 1.0


def test_many_ranks_are_predicted_as_few_are() -> None:
    # Beyond 64 ranks, cells of stages are estimated on a grid: the host stage and the one remote stage stay what they are in all.
    plan = build_plan(documents([512] * 16), 128, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=16)))
    certificate = plan.report(HEADS)
    cost = Machine().cost_model(4, 2, 16)
    for rank, of_rank in enumerate(certificate.stage_timeline):
        computing = (
            of_rank[1] - of_rank[0] + sum(end - begin for begin, end in zip(of_rank[3::3], of_rank[4::3], strict=True))
        )
        assert computing == pytest.approx(certificate.area[rank] * cost.cell, rel=1e-6)
