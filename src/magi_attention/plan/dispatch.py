"""Which rank gets which chunk: algorithms in a table.

Each is a function ``(areas, num_ranks, max_chunks) -> owner``: ``areas`` ``[num_chunks]`` attended cells of each chunk, at most ``max_chunks``
chunks a rank; ``owner`` ``[num_chunks]`` int64. All are deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from magi_attention.config import DispatchConfig, MinHeapDispatchAlg, SequentialDispatchAlg
from magi_attention.mask.bands import K0, K1, Ints, area, split_k, split_q
from magi_attention.plan.layout import ShardLayout

DispatchFunction = Callable[[Ints, int, int], Ints]


def min_heap(areas: Ints, num_ranks: int, max_chunks: int) -> Ints:
    """Largest chunk first, each to the least loaded rank that has room (Graham 1969, longest processing time)."""
    owner = np.empty(len(areas), np.int64)
    heap = [(0, rank, 0) for rank in range(num_ranks)]
    for chunk in np.argsort(-areas, kind="stable").tolist():
        load, rank, count = heapq.heappop(heap)
        owner[chunk] = rank
        if count + 1 < max_chunks:
            heapq.heappush(heap, (load + int(areas[chunk]), rank, count + 1))
    return owner


def sequential(areas: Ints, num_ranks: int, max_chunks: int) -> Ints:
    """Chunks in order, as many to each rank as evenly divides them."""
    num_chunks = len(areas)
    edges = np.arange(num_ranks + 1) * num_chunks // num_ranks
    return np.repeat(np.arange(num_ranks), np.diff(edges))


ALGORITHMS: dict[type, DispatchFunction] = {
    MinHeapDispatchAlg: min_heap,
    SequentialDispatchAlg: sequential,
}


def chunk_areas(bands: Ints, chunk_edges: Ints) -> Ints:
    """``[num_chunks]`` attended cells of the queries of every chunk."""
    pieces, _, chunk = split_q(bands, chunk_edges[:-1], chunk_edges[1:])
    areas = np.zeros(len(chunk_edges) - 1, np.int64)
    np.add.at(areas, chunk, area(pieces))
    return areas


def dispatch(areas: Ints, num_ranks: int, max_chunks: int, config: DispatchConfig) -> Ints:
    """Owners by the algorithm that ``config`` names."""
    algorithm = ALGORITHMS.get(type(config.alg))
    if algorithm is None:
        ready = ", ".join(sorted(kind.__name__ for kind in ALGORITHMS))
        raise NotImplementedError(f"{type(config.alg).__name__} is not implemented yet; until then use one of {ready}")
    return algorithm(areas, num_ranks, max_chunks)


def place_keys(bands: Ints, q_layout: ShardLayout, chunk_edges: Ints, max_chunks: int) -> Ints:
    """Owners of key chunks, where keys may be placed apart from queries: where most of a chunk's rows are attended.

    Chunks that the fewest ranks want are the first to choose; ties go to the lower rank.
    """
    num_chunks, num_ranks = len(chunk_edges) - 1, q_layout.num_ranks
    pieces, _, run = split_q(bands, q_layout.runs[:, 0], q_layout.runs[:, 1])
    parts, piece, chunk = split_k(pieces, chunk_edges[:-1], chunk_edges[1:])
    wanted = np.zeros((num_chunks, num_ranks), np.int64)
    np.add.at(wanted, (chunk, q_layout.runs[run[piece], 2]), parts[:, K1] - parts[:, K0])
    owner = np.empty(num_chunks, np.int64)
    room = np.full(num_ranks, max_chunks)
    regret = wanted.max(axis=1, initial=0) - np.median(wanted, axis=1) if num_ranks > 1 else np.zeros(num_chunks)
    for at in np.argsort(-regret, kind="stable").tolist():
        rank = int(np.argmax(np.where(room > 0, wanted[at], -1)))
        owner[at] = rank
        room[rank] -= 1
    return owner
