"""Dispatch that balances area alone: the classical algorithms for identical machines, with equally many chunks a rank.

Each is a function ``(areas, num_ranks, max_chunks) -> owner``: ``areas`` ``[num_chunks]`` attended cells of each chunk, at
most ``max_chunks``
chunks a rank; ``owner`` ``[num_chunks]`` int64. All are deterministic.
"""

from __future__ import annotations

import heapq

import numpy as np

from magi_attention.mask.bands import Ints

# Chunks up to which the exact search over subsets is done: its cost is 3 ** num_chunks.
MOST_CHUNKS_EXACT = 12


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
    edges = np.arange(num_ranks + 1) * len(areas) // num_ranks
    return np.repeat(np.arange(num_ranks), np.diff(edges))


def sorted_sequential(areas: Ints, num_ranks: int, max_chunks: int) -> Ints:
    """Chunks by falling area, dealt to the ranks in turn, every other round backwards."""
    order = np.argsort(-areas, kind="stable")
    turn, seat = np.divmod(np.arange(len(areas)), num_ranks)
    owner = np.empty(len(areas), np.int64)
    owner[order] = np.where(turn % 2 == 0, seat, num_ranks - 1 - seat)
    return owner


def lower_bound(areas: Ints, num_ranks: int, max_chunks: int) -> int:
    """No assignment has a largest area under this: the mean, the largest chunk, and what the pigeonhole principle forces.

    With ``m * num_ranks + 1`` chunks, some rank holds ``m + 1`` of them: at least the ``m + 1`` smallest of those.
    """
    total, largest = int(areas.sum()), int(areas.max(initial=0))
    falling = np.sort(areas, kind="stable")[::-1]
    bound = max(-(-total // num_ranks), largest)
    for m in range(1, (len(areas) - 1) // num_ranks + 1):
        bound = max(bound, int(falling[m * num_ranks - m : m * num_ranks + 1].sum()))
    return bound


def binary_search(areas: Ints, num_ranks: int, max_chunks: int) -> Ints:
    """The smallest capacity into which first-fit decreasing packs the chunks (MULTIFIT; Coffman, Garey and Johnson 1978)."""
    best = min_heap(areas, num_ranks, max_chunks)
    low = lower_bound(areas, num_ranks, max_chunks)
    high = int(np.bincount(best, weights=areas, minlength=num_ranks).max(initial=0))
    order = np.argsort(-areas, kind="stable")
    while low < high:
        capacity = (low + high) // 2
        owner = _first_fit(areas, order, num_ranks, max_chunks, capacity)
        if owner is None:
            low = capacity + 1
        else:
            best, high = owner, capacity
    return best


def _first_fit(areas: Ints, order: Ints, num_ranks: int, max_chunks: int, capacity: int) -> Ints | None:
    owner = np.empty(len(areas), np.int64)
    load, count = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for chunk in order.tolist():
        fits = (count < max_chunks) & (load + areas[chunk] <= capacity)
        rank = int(np.argmax(fits))
        if not fits[rank]:
            return None
        owner[chunk] = rank
        load[rank] += areas[chunk]
        count[rank] += 1
    return owner


def dynamic_programming(areas: Ints, num_ranks: int, max_chunks: int) -> Ints:
    """The least possible largest area, over all subsets of the chunks.

    Raises:
        ValueError: more than `MOST_CHUNKS_EXACT` chunks.
    """
    num_chunks = len(areas)
    if num_chunks > MOST_CHUNKS_EXACT:
        raise ValueError(
            f"DPDispatchAlg searches all subsets of the chunks and takes at most {MOST_CHUNKS_EXACT} of them, got {num_chunks}; use "
            "BSDispatchAlg, which comes close, or MinHeapDispatchAlg, or a larger chunk_size"
        )
    sizes = [bin(subset).count("1") for subset in range(1 << num_chunks)]
    load = [sum(int(areas[c]) for c in range(num_chunks) if subset >> c & 1) for subset in range(1 << num_chunks)]
    full = (1 << num_chunks) - 1
    # best[s]: the least largest area of the ranks so far, holding exactly the chunks s; chosen[rank][s]: the last rank's share.
    best: dict[int, int] = {0: 0}
    chosen: list[dict[int, int]] = []
    for rank in range(num_ranks):
        following: dict[int, int] = {}
        choice: dict[int, int] = {}
        for held, value in best.items():
            free = full & ~held
            share = free
            while True:
                rest = sizes[free] - sizes[share]
                if sizes[share] <= max_chunks and rest <= (num_ranks - 1 - rank) * max_chunks:
                    worst = max(value, load[share])
                    if worst < following.get(held | share, worst + 1):
                        following[held | share], choice[held | share] = worst, share
                if share == 0:
                    break
                share = (share - 1) & free
        best = following
        chosen.append(choice)
    owner = np.empty(num_chunks, np.int64)
    held = full
    for rank in reversed(range(num_ranks)):
        share = chosen[rank][held]
        owner[[c for c in range(num_chunks) if share >> c & 1]] = rank
        held &= ~share
    return owner
