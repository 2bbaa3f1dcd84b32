"""Dispatch that knows what must move: balanced area, equal chunks, little sent and received.

1. *Start.* Of several assignments by runs of the sequence (see ``plan.walks``), the one whose busiest rank sends or receives least.
2. *Mend.* While a rank's area exceeds the limit, the swap of two chunks that brings it under and costs the fewest rows.
3. *Relieve.* The rank of the largest load swaps a chunk for one that lowers the larger load of the pair, until none does.
4. *Reduce.* Every rank, those of the largest load first, makes the swap that lowers what is received in all, if no load grows beyond the
   largest.

Steps 2 to 4 are in ``plan.swaps``. Everything is counted in columns, the chunks of the key sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from magi_attention.mask.bands import Ints
from magi_attention.plan.chunk_demand import ChunkDemand, traffic
from magi_attention.plan.swaps import SwapSearch
from magi_attention.plan.walks import MANY_CHUNKS, starts

_NUM_RELIEFS = 64
# Another start is taken for its balance if its largest load is at most so many times the first one's.
_MOST_LOAD = 1.25
# Ranks whose received rows are reduced, in a round: those of the largest load.
_NUM_REDUCED = 512


def affinity(demand: ChunkDemand, num_ranks: int, area_limit: int, tight_limit: int) -> Iterator[Ints]:
    """``[num_chunks]`` owners, equally many chunks a rank: first with areas up to ``area_limit`` where that can be reached, then, for who
    asks for more, mended on to ``tight_limit``."""
    found = starts(demand, num_ranks, area_limit)
    loads = [np.maximum(*traffic(demand, owner, num_ranks)) for owner in found]
    order = sorted(range(len(found)), key=lambda at: (int(loads[at].max()), int(loads[at].sum())))
    most_load = _MOST_LOAD * int(loads[order[0]].max())
    search = _first_within(demand, [found[at] for at in order if loads[at].max() <= most_load], num_ranks, area_limit)
    improve(search, area_limit)
    yield search.owner.copy()
    largest = [int(np.bincount(found[at], weights=demand.areas, minlength=num_ranks).max()) for at in order]
    balanced = [found[at] for at, area in zip(order, largest, strict=True) if area <= tight_limit]
    if balanced:
        search = SwapSearch(demand, balanced[0], num_ranks)
        improve(search, tight_limit)
    else:
        search.mend(tight_limit, num_swaps=2 * num_ranks)
    yield search.owner.copy()


def _first_within(demand: ChunkDemand, found: list[Ints], num_ranks: int, area_limit: int) -> SwapSearch:
    """The first of the assignments that can be mended to the limit; where none can, the first of all."""

    def mended(owner: Ints) -> SwapSearch:
        search = SwapSearch(demand, owner, num_ranks)
        search.mend(area_limit, num_swaps=2 * num_ranks)
        return search

    for owner in found:
        search = mended(owner)
        if search.area.max() <= area_limit:
            return search
    return mended(found[0])


def improve(search: SwapSearch, area_limit: int) -> None:
    """Steps 2 to 4, and once more what they make worth trying again."""
    # A swap among many chunks costs more to find and saves less.
    num_reduced, num_rounds = min(search.num_ranks, _NUM_REDUCED), 2
    if len(search.owner) >= MANY_CHUNKS * search.num_ranks:
        num_reduced, num_rounds = min(search.num_ranks // 2, _NUM_REDUCED), 1
    for _ in range(num_rounds):
        search.mend(area_limit, num_swaps=2 * search.num_ranks)
        search.relieve(area_limit, num_swaps=_NUM_RELIEFS)
        search.reduce(area_limit, num_reduced)
    search.mend(area_limit, num_swaps=2 * search.num_ranks)
    search.relieve(area_limit, num_swaps=_NUM_RELIEFS // 2)


def top_p_heap(demand: ChunkDemand, num_ranks: int, max_chunks: int, top_p: float) -> Ints:
    """Largest chunk first, to that of the least loaded ``top_p`` share of ranks which already needs most of its columns.

    With ``top_p`` 0 (one rank), this is `min_heap`.
    """
    starts = np.searchsorted(demand.chunk, np.arange(len(demand.areas) + 1))
    owner = np.empty(len(demand.areas), np.int64)
    needs = np.zeros((num_ranks, len(demand.rows)), bool)
    load, count = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for chunk in np.argsort(-demand.areas, kind="stable").tolist():
        columns = np.concatenate(
            [np.arange(demand.first[at], demand.last[at]) for at in range(starts[chunk], starts[chunk + 1])]
            or [np.empty(0, np.int64)]
        )
        open_ranks = np.flatnonzero(count < max_chunks)
        candidates = open_ranks[np.argsort(load[open_ranks], kind="stable")[: max(1, int(top_p * len(open_ranks)))]]
        shared = (needs[np.ix_(candidates, columns)] * demand.rows[columns]).sum(axis=1)
        rank = int(candidates[np.argmax(shared)])
        owner[chunk] = rank
        needs[rank, columns] = True
        load[rank] += demand.areas[chunk]
        count[rank] += 1
    return owner
