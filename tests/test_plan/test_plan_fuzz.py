"""The plan, carried out on row numbers, computes the mask: each cell once, each demanded row delivered once, no other."""

import numpy as np
import pytest

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import check_disjoint
from magi_attention.plan import build_plan
from magi_attention.plan.query_moves import RowBytes
from magi_attention.testing.plan_check import check_cells, check_deliveries

ALGORITHMS = (
    AffinityDispatchAlg(),
    MinHeapDispatchAlg(),
    SequentialDispatchAlg(),
    SortedSequentialSelectAlg(),
    ToppHeapDispatchAlg(top_p=0.4),
    BSDispatchAlg(),
)


def random_disjoint_mask(rng: np.random.Generator, num_q: int, num_k: int) -> AttnMask:
    """Random slices of all four types, ranges overlapping freely; a slice that would list a cell twice is left out."""
    kept: list[tuple[list[int], list[int], int]] = []
    covered = np.zeros((num_q, num_k), bool)
    for _ in range(rng.integers(0, 12)):
        q = np.sort(rng.integers(0, num_q + 1, 2)).tolist()
        k = np.sort(rng.integers(0, num_k + 1, 2)).tolist()
        kind = int(rng.integers(0, 4))
        cells = AttnMask.from_slices([q], [k], [kind], num_q, num_k).to_dense()
        if not (cells & covered).any():
            covered |= cells
            kept.append((q, k, kind))
    return AttnMask.from_slices([s[0] for s in kept], [s[1] for s in kept], [s[2] for s in kept], num_q, num_k)


def random_documents(rng: np.random.Generator, total: int, window: int | None) -> AttnMask:
    """Packed causal documents, many of one token; with a window, each is one band row."""
    edges = np.unique(np.concatenate([[0, total], rng.integers(0, total + 1, rng.integers(0, 8))]))
    starts, ends = edges[:-1], edges[1:]
    lo = starts - ends + 1 if window is None else np.full(len(starts), -window)
    bands = np.stack([starts, ends, starts, ends, np.maximum(lo, starts - ends + 1), np.zeros_like(starts)], axis=1)
    return AttnMask(bands, total, total)


def random_config(rng: np.random.Generator, num_q: int) -> DistAttnConfig:
    chunk_size = None if rng.random() < 0.2 else int(rng.integers(1, max(2, num_q // 2)))
    alg = ALGORITHMS[int(rng.integers(0, len(ALGORITHMS)))]
    return DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=chunk_size, uneven_shard=bool(rng.random() < 0.3), alg=alg),
        overlap_config=OverlapConfig(
            mode=AttnOverlapMode.DYNAMIC if rng.random() < 0.4 else AttnOverlapMode.STATIC,
            degree=int(rng.integers(1, 5)),
            min_chunk_size=1,
            max_num_chunks=int(rng.integers(1, 9)),
            alg=GreedyOverlapAlg() if rng.random() < 0.5 else UniformOverlapAlg(),
            comm_cost_factor=float(rng.uniform(0.1, 30)),
        ),
    )


@pytest.mark.parametrize("seed", range(24))
def test_planned_slices_are_the_mask_and_rows_arrive_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for case in range(60):
        num_q = int(rng.choice([1, 2, 7, 13, 31, 53, 64]))
        same_source = bool(rng.random() < 0.7)
        num_k = num_q if same_source else int(rng.choice([1, 5, 29, 64]))
        if same_source and case % 3 == 0:
            mask = random_documents(rng, num_q, None if rng.random() < 0.5 else int(rng.integers(0, num_q)))
        else:
            mask = random_disjoint_mask(rng, num_q, num_k)
        check_disjoint(mask.bands)
        flag = bool(rng.random() < 0.8)
        num_ranks = int(rng.integers(1, 9))
        per_node = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        plan = build_plan(
            mask,
            num_ranks,
            random_config(rng, num_q),
            is_same_source=same_source,
            is_q_permutable=flag,
            is_k_permutable=flag if same_source else bool(rng.random() < 0.5),
            moves_queries=RowBytes(key=int(rng.integers(1, 9)), query=int(rng.integers(1, 9)))
            if rng.random() < 0.4
            else None,
            ranks_per_node=int(rng.choice(per_node)) if rng.random() < 0.4 else None,
        )
        check_cells(plan)
        check_deliveries(plan)
        assert plan.areas.sum() == mask.area
