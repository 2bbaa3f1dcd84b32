"""Dispatch that knows what must move: never past its limits, little moved, the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from magi_attention.config import (
    AffinityDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    SequentialDispatchAlg,
    ToppHeapDispatchAlg,
)
from magi_attention.mask import AttnMask, causal, varlen, varlen_block_causal
from magi_attention.mask.bands import Ints, area
from magi_attention.plan import AttnPlan, balance, build_plan
from magi_attention.plan.chunk_demand import traffic
from magi_attention.plan.demand import BEGIN, DST, END
from magi_attention.plan.dispatch import (
    ACCEPTED_PERMILLE,
    AREA_SLACK_PERMILLE,
    DispatchProblem,
    candidates,
    chunk_areas,
    dispatch,
)
from magi_attention.plan.swaps import SwapSearch
from magi_attention.plan.walks import documents_of, shares, starts, two_walks


def cu_seqlens(total: int, mean: float, seed: int) -> Ints:
    """Edges of documents of log-normal lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(mean) - 0.5, 1.0, 4 * int(total / mean) + 8).astype(np.int64) + 1
    edges = np.append(0, np.cumsum(lengths))
    assert edges[-1] >= total
    return np.append(edges[edges < total], total)


MASKS: dict[str, AttnMask] = {
    "causal": causal(8192),
    "documents": varlen(cu_seqlens(8192, 700, 0), causal=True),
    "many documents": varlen(cu_seqlens(8192, 90, 1), causal=True),
    "full documents": varlen(cu_seqlens(8192, 700, 2)),
    "window": varlen([0, 8192], window_size=(500, 0)),
    "blocks": varlen_block_causal(cu_seqlens(8192, 1500, 3), 256),
    "half empty": AttnMask(causal(4096).bands, 8192, 8192),
    "nothing": AttnMask(np.empty((0, 6), np.int64), 8192, 8192),
}


def problem_of(mask: AttnMask, chunk_size: int, num_ranks: int) -> DispatchProblem:
    edges = np.arange(0, mask.num_q + 1, chunk_size)
    return DispatchProblem(mask.bands, edges, edges, True, chunk_areas(mask.bands, edges), num_ranks)


def largest(problem: DispatchProblem, owner: Ints) -> int:
    return int(np.bincount(owner, weights=problem.areas, minlength=problem.num_ranks).max())


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 16])
@pytest.mark.parametrize("name", MASKS)
def test_equal_tokens_and_areas_within_limits(name: str, num_ranks: int) -> None:
    problem = problem_of(MASKS[name], 64, num_ranks)
    found = list(candidates(problem, DispatchConfig(alg=AffinityDispatchAlg())))
    heap = dispatch(problem, DispatchConfig(alg=MinHeapDispatchAlg()))
    assert any((owner == heap).all() for owner in found)
    mean, reachable = problem.areas.sum() / num_ranks, largest(problem, heap)
    # Within 5 % of the mean or, where that cannot be had, within 4.5 % of what min-heap reaches.
    limit = mean * ACCEPTED_PERMILLE / 1000
    limit = limit if reachable <= limit else reachable * AREA_SLACK_PERMILLE / 1000
    for owner in found:
        assert (np.bincount(owner, minlength=num_ranks) == problem.max_chunks).all(), "equal tokens on every rank"
        assert largest(problem, owner) <= limit


def test_traffic_is_the_plan_s_where_documents_end_with_chunks() -> None:
    mask = varlen([0, 1024, 1536, 4096, 8192])
    for alg in (AffinityDispatchAlg(), MinHeapDispatchAlg(), SequentialDispatchAlg()):
        plan = build_plan(mask, 8, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=64, alg=alg)))
        received, sent = traffic(problem_of(mask, 64, 8).demand(), plan.q_layout.owner, 8)
        np.testing.assert_array_equal(received, plan.received_rows)
        np.testing.assert_array_equal(sent, plan.sent_rows)


@pytest.mark.parametrize("name", MASKS)
def test_what_a_search_keeps_up_to_date(name: str) -> None:
    demand = problem_of(MASKS[name], 64, 8).demand()
    for start in starts(demand, 8, 0):
        search = SwapSearch(demand, start, 8)
        before = search.load.max()
        search.relieve(int(search.area.max()), num_swaps=20)
        assert search.load.max() <= before
        search.reduce(int(search.area.max()), most=8)
        assert search.load.max() <= before
        received, sent = traffic(demand, search.owner, 8)
        np.testing.assert_array_equal(search.received, received)
        np.testing.assert_array_equal(search.sent, sent)
        np.testing.assert_array_equal(search.area, np.bincount(search.owner, weights=demand.areas, minlength=8))
        fresh = SwapSearch(demand, search.owner, 8)
        for field in ("needs", "others", "unneeded", "freed"):
            np.testing.assert_array_equal(getattr(search, field), getattr(fresh, field), err_msg=field)


def test_documents_are_found() -> None:
    # Ends within chunks of 64: a chunk belongs to the document whose end it holds.
    demand = problem_of(varlen([0, 300, 1024, 1030, 2048], causal=True), 64, 4).demand()
    assert np.flatnonzero(np.diff(documents_of(demand))).tolist() == [4, 15]


def test_heads_of_long_documents_are_held_by_many() -> None:
    # One rank that holds the head of a long document sends it to all others; shares of its ends and its beginnings do not.
    mask = varlen(cu_seqlens(65536, 4000, 0), causal=True)
    demand = problem_of(mask, 128, 32).demand()
    walked, shared = two_walks(demand.areas, 32, by_level=False), shares(demand, 32, 1.0)
    longest = int(np.diff(cu_seqlens(65536, 4000, 0)).max())
    assert traffic(demand, walked, 32)[1].max() > 2 * longest
    assert traffic(demand, shared, 32)[1].max() < 1.5 * longest


def test_documents_of_equal_size_stay_whole() -> None:
    # Eight documents for eight ranks: no row need move, and balance is perfect.
    plan = build_plan(
        varlen(np.arange(9) * 512, causal=True), 8, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=64))
    )
    assert plan.received_rows.sum() == 0
    assert plan.imbalance == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_far_fewer_rows_on_packed_documents(seed: int) -> None:
    mask = varlen(cu_seqlens(65536, 4000, seed), causal=True)
    ours, heap = (
        build_plan(mask, 16, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=128, alg=alg)))
        for alg in (AffinityDispatchAlg(), MinHeapDispatchAlg())
    )
    assert ours.received_rows.sum() <= 0.33 * heap.received_rows.sum()
    assert ours.received_rows.max() <= 0.5 * heap.received_rows.max()
    assert ours.imbalance <= 1.05


def test_top_p_of_one_rank_is_min_heap() -> None:
    problem = problem_of(MASKS["documents"], 64, 8)
    found = dispatch(problem, DispatchConfig(alg=ToppHeapDispatchAlg(top_p=0.0)))
    np.testing.assert_array_equal(found, balance.min_heap(problem.areas, 8, problem.max_chunks))


_PRINT_DIGESTS = """
import numpy as np
from magi_attention.config import *
from magi_attention.mask import varlen
from magi_attention.plan import build_plan
mask = varlen([0, 700, 1100, 1111, 2500, 4096], causal=True)
for alg in (AffinityDispatchAlg(), MinHeapDispatchAlg(), ToppHeapDispatchAlg(top_p=0.5), BSDispatchAlg(), SortedSequentialSelectAlg()):
    for overlap in (OverlapConfig(), OverlapConfig(degree=3, min_chunk_size=1, alg=GreedyOverlapAlg())):
        config = DistAttnConfig(DispatchConfig(chunk_size=64, alg=alg), overlap)
        print(build_plan(mask, 8, config, ranks_per_node=4).digest().hex())
"""


def test_the_same_plan_whatever_the_hash_seed() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", _PRINT_DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4711")
    }
    assert len(printed) == 1
    assert len(set(printed.pop().split())) > 5


def attended_keys(plan: AttnPlan, rank: int) -> list[tuple[int, int]]:
    """Disjoint ascending intervals of the keys that a rank's queries attend and that it does not hold, worked out run by run."""
    found = []
    for start, end, _, _ in plan.q_layout.rank_runs(rank).tolist():
        for q0, q1, k0, k1, lo, hi in plan.mask.bands.tolist():
            first, last = max(start, q0), min(end, q1) - 1
            begin, stop = max(k0, first + lo), min(k1, last + hi + 1)
            if first <= last and begin < stop:
                found.append((begin, stop))
    own = [(start, end) for start, end, _, _ in plan.k_layout.rank_runs(rank).tolist()]
    return subtract(join(found), own)


def join(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def subtract(intervals: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    left = []
    for begin, end in intervals:
        at = begin
        for hole_begin, hole_end in holes:
            if hole_end <= at or hole_begin >= end:
                continue
            if hole_begin > at:
                left.append((at, hole_begin))
            at = max(at, hole_end)
        if at < end:
            left.append((at, end))
    return left


def test_a_thousand_ranks() -> None:
    num_ranks, total = 1024, 1 << 20
    mask = varlen(cu_seqlens(total, 15_000, 0), causal=True)
    plan = build_plan(mask, num_ranks, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=128)))
    assert (plan.q_layout.num_rows == total // num_ranks).all()
    assert plan.areas.sum() == mask.area
    table = plan.forward.table
    order = np.lexsort((table[:, BEGIN], table[:, DST]))
    of_rank = np.split(table[order], np.searchsorted(table[order, DST], np.arange(1, num_ranks)))
    for rank in range(num_ranks):
        arriving = [(int(row[BEGIN]), int(row[END])) for row in of_rank[rank]]
        assert all(end <= begin for (_, end), (begin, _) in zip(arriving, arriving[1:], strict=False)), (
            "a row arrives twice"
        )
        assert join(arriving) == attended_keys(plan, rank)
    for rank in range(0, num_ranks, 73):
        part = plan.rank(rank)
        cells = [part.host_bands, *(stage.bands for stage in part.stages)]
        assert sum(int(area(bands).sum()) for bands in cells) == plan.areas[rank]
        for stage in part.stages:
            for source in np.flatnonzero(stage.exchange.recv_splits)[:3].tolist():
                sends = plan.rank(source).stages[0].exchange.send_splits[rank]
                assert sends == stage.exchange.recv_splits[source]
