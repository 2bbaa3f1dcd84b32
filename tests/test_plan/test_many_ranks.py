"""Every dispatcher, stage split, hierarchy and moved query, on up to 1,024 ranks: carried out on row numbers, as in the fuzz of few."""

from __future__ import annotations

import numpy as np
import pytest

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
)
from magi_attention.mask import AttnMask, causal, varlen, varlen_block_causal
from magi_attention.plan import build_plan
from magi_attention.plan.query_moves import RowBytes
from magi_attention.testing.plan_check import check_cells, check_deliveries

ALGORITHMS: tuple[DispatchAlg, ...] = (
    AffinityDispatchAlg(),
    MinHeapDispatchAlg(),
    SequentialDispatchAlg(),
    SortedSequentialSelectAlg(),
    ToppHeapDispatchAlg(top_p=0.5),
    BSDispatchAlg(),
)
STAGES = {
    "one stage": OverlapConfig(),
    "three stages": OverlapConfig(degree=3, min_chunk_size=1),
    "greedy": OverlapConfig(degree=2, min_chunk_size=1, alg=GreedyOverlapAlg(), max_num_chunks=5),
    "chosen": OverlapConfig(
        mode=AttnOverlapMode.DYNAMIC, min_chunk_size=1, dynamic_max_degree=4, comm_cost_factor=20.0
    ),
}


def random_mask(rng: np.random.Generator, total: int) -> AttnMask:
    edges = np.unique(np.concatenate([[0, total], rng.integers(1, total, 9)]))
    suffix = AttnMask.from_slices([[total - 5, total]], [[0, total]], "causal", total, total)
    masks = [causal(total), varlen(edges, causal=True), varlen_block_causal(edges, 7), varlen(edges), suffix]
    masks.append(varlen(edges, window_size=(int(rng.integers(1, 40)), 3)))
    return masks[int(rng.integers(0, len(masks)))]


def check(num_ranks: int, seed: int, alg: DispatchAlg, stages: str, *, moves: bool, nodes: bool) -> None:
    rng = np.random.default_rng([num_ranks, seed])
    chunk_size = int(rng.integers(1, 4))
    total = num_ranks * chunk_size * int(rng.integers(1, 1 + min(3, max(1, 4096 // (num_ranks * chunk_size)))))
    total -= int(rng.integers(0, chunk_size + 1))
    plan = build_plan(
        random_mask(rng, total),
        num_ranks,
        DistAttnConfig(DispatchConfig(chunk_size=chunk_size, uneven_shard=seed % 4 == 3, alg=alg), STAGES[stages]),
        moves_queries=RowBytes(key=2, query=3) if moves else None,
        ranks_per_node=int(rng.choice([2, 8, num_ranks // 4])) if nodes else None,
    )
    check_cells(plan)
    check_deliveries(plan)
    assert plan.areas.sum() == plan.mask.area


def check_one_of_each(num_ranks: int, alg: DispatchAlg, stages: str, turn: int) -> None:
    """Flat or on nodes, keys or queries moving: each algorithm meets all four, each with other stages."""
    at_alg, at_stages = ALGORITHMS.index(alg), list(STAGES).index(stages)
    nodes, moves = divmod((at_alg + at_stages + turn) % 4, 2)
    check(num_ranks, at_alg + len(ALGORITHMS) * at_stages, alg, stages, moves=bool(moves), nodes=bool(nodes))


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("alg", ALGORITHMS, ids=lambda alg: alg.type.value)
def test_dozens_of_ranks(alg: DispatchAlg, stages: str) -> None:
    check_one_of_each((24, 40, 64)[ALGORITHMS.index(alg) % 3], alg, stages, 0)


@pytest.mark.long
@pytest.mark.parametrize(("num_ranks", "turn"), [(256, 0), (256, 1), (1024, 2)])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("alg", ALGORITHMS, ids=lambda alg: alg.type.value)
def test_hundreds_of_ranks(alg: DispatchAlg, stages: str, num_ranks: int, turn: int) -> None:
    check_one_of_each(num_ranks, alg, stages, turn)


@pytest.mark.parametrize("kind", ["flat", "nodes", "queries"])
def test_a_thousand_ranks(kind: str) -> None:
    edges = np.append(np.arange(0, 2048, 100), 2048)
    plan = build_plan(
        varlen(edges, causal=True),
        1024,
        DistAttnConfig(DispatchConfig(chunk_size=2), OverlapConfig(degree=2, min_chunk_size=1)),
        moves_queries=RowBytes(key=4, query=3) if kind == "queries" else None,
        ranks_per_node=8 if kind == "nodes" else None,
    )
    assert (plan.moved is not None) == (kind == "queries")
    assert (plan.rows_between_nodes > 0) == (kind == "nodes")
    check_cells(plan)
    check_deliveries(plan)


def test_queries_on_their_way_to_hundreds_of_ranks() -> None:
    # 16 queries at the end of 512 tokens move to all who hold keys; nodes of 8.
    mask = AttnMask.from_slices([[496, 512]], [[0, 512]], "causal")
    config = DistAttnConfig(DispatchConfig(chunk_size=2))
    plan = build_plan(mask, 256, config, moves_queries=RowBytes(key=4, query=1), ranks_per_node=8)
    assert plan.received_queries.sum() > 16 * 200
    check_cells(plan)
    check_deliveries(plan)
