"""Dispatch that knows what must move: balanced area, equal chunks, few rows received.

Chunks that attend the same keys are neighbours in almost every mask, and what makes a rank receive little is holding *runs* of them. But
runs alone are unbalanced: late chunks of long documents have many times the area of others. So:

1. *Two walks.* Chunks heavier than the mean, and the others, are two lists in sequence order. Every rank takes the next stretch of
   each, as long as makes its number of chunks and its area right: two runs a rank, and balance.
2. *Mending.* While a rank's area exceeds the limit, the swap of two chunks that brings it under and costs the fewest received rows.
3. *Relief.* The rank that receives most swaps a chunk for one that lowers the larger received count of the pair, until none does;
   then every rank, those that receive most first, makes the swap that lowers the sum of the pair's counts most.

Everything is counted in columns, the chunks of the key sequence; ``D[c]`` are the columns that chunk ``c`` attends, kept as
intervals, so that
what a rank would receive with or without a chunk is a difference of two prefix sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import K0, K1, Ints, expand, split_q
from magi_attention.plan.balance import sequential
from magi_attention.plan.demand import union_by_group

Counts = NDArray[np.int32]

# The best this many swaps, by their estimated gain, are worked out exactly before one is made.
_NUM_EXACT = 4
_MOST_RELIEFS = 128
# Of the others' chunks, the ones whose coming and going alone costs least are looked at.
_NUM_THEIRS = 1024
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class ChunkDemand:
    """What is known of the chunks before they have owners.

    ``areas``: ``[num_chunks]`` attended cells. ``chunk``, ``first``, ``last``: ``[n]``, rows ``D[chunk]`` includes columns
    ``[first, last)``; ordered by chunk. ``rows``:
    ``[num_columns]`` key rows of each column. ``owns_columns``: column ``c`` belongs to the owner of chunk ``c`` (self-attention).
    """

    areas: Ints
    chunk: Ints
    first: Ints
    last: Ints
    rows: Ints
    owns_columns: bool


def chunk_demand(bands: Ints, areas: Ints, q_edges: Ints, k_edges: Ints, owns_columns: bool) -> ChunkDemand:
    """The demand of query chunks ``q_edges`` ``[num_chunks + 1]`` in columns ``k_edges``, from a mask's rows."""
    pieces, _, chunk = split_q(bands, q_edges[:-1], q_edges[1:])
    first = np.searchsorted(k_edges, pieces[:, K0], side="right") - 1
    last = np.searchsorted(k_edges, pieces[:, K1], side="left")
    chunk, first, last = union_by_group(chunk, first, last).T
    return ChunkDemand(areas, chunk, first, last, np.diff(k_edges), owns_columns)


def affinity(demand: ChunkDemand, num_ranks: int, area_limit: int) -> Ints:
    """``[num_chunks]`` owners, equally many chunks a rank. ``area_limit``: largest area of a rank to aim at."""
    num_chunks = len(demand.areas)
    starts = [two_walks(demand.areas, num_ranks, by_level=level) for level in (False, True)]
    in_order = sequential(demand.areas, num_ranks, -(-num_chunks // num_ranks))
    if np.bincount(in_order, weights=demand.areas, minlength=num_ranks).max(initial=0) <= area_limit:
        starts.append(in_order)
    received = [int(received_rows(demand, count_needs(demand, start, num_ranks), start).sum()) for start in starts]
    search = SwapSearch(demand, starts[int(np.argmin(received))], num_ranks)
    search.mend(area_limit, num_swaps=2 * num_ranks)
    search.relieve(area_limit, num_swaps=min(num_ranks // 2, _MOST_RELIEFS))
    search.reduce(area_limit, num_rounds=1)
    return search.owner


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


def two_walks(areas: Ints, num_ranks: int, *, by_level: bool) -> Ints:
    """Phase 1. Every rank takes a stretch of the heavy chunks and one of the light.

    Both lists are walked in sequence order or, ``by_level``, in order of how heavy the rising stretch (a document, say) is that a chunk
    belongs to: the heaviest stretches meet the lightest.
    """
    heavy_mask = areas * len(areas) > areas.sum()
    level = np.zeros(len(areas), np.int64)
    if by_level:
        stretch = np.cumsum(np.diff(areas, prepend=0) < 0)
        level = np.maximum.reduceat(areas, np.flatnonzero(np.diff(stretch, prepend=-1)))[stretch]
    order_up, order_down = np.argsort(level, kind="stable"), np.argsort(-level, kind="stable")
    heavy, light = order_down[heavy_mask[order_down]], order_up[~heavy_mask[order_up]]
    heavy_sum, light_sum = (np.append(0, np.cumsum(areas[chunks])) for chunks in (heavy, light))
    owner = np.empty(len(areas), np.int64)
    at_heavy = at_light = 0
    for rank in range(num_ranks):
        left = len(areas) - at_heavy - at_light
        count = left // (num_ranks - rank) if left % (num_ranks - rank) == 0 else left // (num_ranks - rank) + 1
        num_heavy = np.arange(max(0, count - (len(light) - at_light)), min(count, len(heavy) - at_heavy) + 1)
        area = heavy_sum[at_heavy + num_heavy] + light_sum[at_light + count - num_heavy]
        area -= heavy_sum[at_heavy] + light_sum[at_light]
        remaining = heavy_sum[-1] - heavy_sum[at_heavy] + light_sum[-1] - light_sum[at_light]
        take = int(num_heavy[np.argmin(np.abs(area * (num_ranks - rank) - remaining))])
        owner[heavy[at_heavy : at_heavy + take]] = rank
        owner[light[at_light : at_light + count - take]] = rank
        at_heavy, at_light = at_heavy + take, at_light + count - take
    return owner


def count_needs(demand: ChunkDemand, owner: Ints, num_ranks: int) -> Counts:
    """``[num_ranks, num_columns]`` int32: how many of a rank's chunks attend a column."""
    change = np.zeros((num_ranks, len(demand.rows) + 1), np.int32)
    np.add.at(change, (owner[demand.chunk], demand.first), 1)
    np.add.at(change, (owner[demand.chunk], demand.last), -1)
    return np.cumsum(change, axis=1, dtype=np.int32)[:, :-1]


def received_rows(demand: ChunkDemand, needs: Counts, owner: Ints) -> Ints:
    """``[num_ranks]``: rows of the columns that a rank needs and does not own."""
    received = np.where(needs > 0, demand.rows.astype(np.int32), np.int32(0)).sum(axis=1, dtype=np.int64)
    if demand.owns_columns:
        column = np.arange(len(owner))
        at_home = needs[owner, column] > 0
        np.subtract.at(received, owner[at_home], demand.rows[at_home])
    return received


class SwapSearch:
    """An assignment under swaps, with what every rank computes and receives kept up to date.

    ``needs``: see `count_needs`. ``unneeded``, ``lone``: ``[num_ranks, num_columns + 1]`` int64 prefix sums over columns of
    the rows of columns
    that none, and that exactly one, of a rank's chunks attend. ``freed``: ``[num_chunks]`` rows that a chunk's rank would no
    longer receive without it.
    """

    def __init__(self, demand: ChunkDemand, owner: Ints, num_ranks: int) -> None:
        self.demand, self.owner, self.num_ranks = demand, owner.copy(), num_ranks
        num_chunks = len(demand.areas)
        self.starts = np.searchsorted(demand.chunk, np.arange(num_chunks + 1))
        self.attends_itself = np.zeros(num_chunks, bool)
        self.attends_itself[demand.chunk[(demand.first <= demand.chunk) & (demand.chunk < demand.last)]] = True
        self.area = np.zeros(num_ranks, np.int64)
        np.add.at(self.area, owner, demand.areas)
        self.needs = count_needs(demand, owner, num_ranks)
        self.received = received_rows(demand, self.needs, owner)
        self.unneeded = np.zeros((num_ranks, len(demand.rows) + 1), np.int64)
        self.lone = np.zeros((num_ranks, len(demand.rows) + 1), np.int64)
        self.freed = np.zeros(num_chunks, np.int64)
        for rank in range(num_ranks):
            self._refresh(rank)

    def _refresh(self, rank: int) -> None:
        """Bring what is derived from ``needs`` and ``owner`` up to date, for one rank."""
        demand, needs = self.demand, self.needs[rank]
        rows = demand.rows
        chunks = np.flatnonzero(self.owner == rank)
        alone = needs == 1
        remote = needs > 0
        if demand.owns_columns:
            alone[chunks] = remote[chunks] = False
        np.cumsum(rows * (needs == 0), out=self.unneeded[rank, 1:])
        np.cumsum(rows * alone, out=self.lone[rank, 1:])
        self.received[rank] = rows[remote].sum()
        self.freed[chunks] = self._over_demand(self.lone[rank], chunks)
        if demand.owns_columns:  # a column that leaves with its chunk must be received, if others need it
            self.freed[chunks] -= np.where(needs[chunks] > 1, rows[chunks], 0)

    def _over_demand(self, prefix: Ints, chunks: Ints) -> Ints:
        """``[..., num_columns + 1]`` prefix sums to ``[..., len(chunks)]``: their sum over the columns of each chunk."""
        demand, first = self.demand, self.starts[chunks]
        count = self.starts[chunks + 1] - first
        if (count == 1).all():
            single: Ints = prefix[..., demand.last[first]] - prefix[..., demand.first[first]]
            return single
        row, at = expand(first, count)
        total = np.zeros((len(chunks), *prefix.shape[:-1]), np.int64)
        np.add.at(total, row, np.moveaxis(prefix[..., demand.last[at]] - prefix[..., demand.first[at]], -1, 0))
        return np.moveaxis(total, 0, -1)

    def badness(self, area_limit: int) -> tuple[int, int, int]:
        """What to minimise: area beyond the limit, rows received by the busiest rank, rows received in all."""
        return max(0, int(self.area.max()) - area_limit), int(self.received.max()), int(self.received.sum())

    def mend(self, area_limit: int, num_swaps: int) -> None:
        """Phase 2. Bring ranks under the area limit, heaviest first; a rank that no swap helps is left."""
        stuck = np.zeros(self.num_ranks, bool)
        for _ in range(num_swaps):
            area = np.where(stuck, 0, self.area)
            rank = int(np.argmax(area))
            if area[rank] <= area_limit:
                return
            # Only a rank below the mean takes load over, and only for a chunk lighter than our heaviest.
            lighter = self.demand.areas < self.demand.areas[self.owner == rank].max()
            view = SwapView(self, rank, lighter & (self.area * self.num_ranks < self.area.sum())[self.owner])
            worst = view.worst_area()
            fits = worst <= area_limit
            if fits.any():
                score = np.where(fits, view.change_in_all(), _NEVER)
            else:  # no swap fits: take the largest step down
                score = np.where(worst < self.area[rank], worst, _NEVER)
            best = int(np.argmin(score)) if score.size else -1
            if best < 0 or score.flat[best] == _NEVER:
                stuck[rank] = True
            else:
                self._swap(*view.pair(best))

    def relieve(self, area_limit: int, num_swaps: int) -> None:
        """Phase 3. Swap away from the rank that receives most, while that lowers the larger count of a pair; then it is left."""
        limit = max(area_limit, int(self.area.max()))
        stuck = np.zeros(self.num_ranks, bool)
        for _ in range(num_swaps):
            busiest = int(np.argmax(np.where(stuck, -1, self.received)))
            if stuck[busiest]:
                return
            view = SwapView(self, busiest)
            score = np.where(view.worst_area() <= limit, view.worst_received(), _NEVER)
            before = int(self.received[busiest])
            stuck[busiest] = not self._try_best(view, score, before, lambda new, old: new.max() < old.max())

    def reduce(self, area_limit: int, num_rounds: int) -> None:
        """Phase 3, second half. For every rank, those that receive most first, the swap that lowers the pair's sum most."""
        limit = max(area_limit, int(self.area.max()))
        for _ in range(num_rounds):
            ceiling = int(self.received.max())
            for rank in np.argsort(-self.received, kind="stable").tolist():
                view = SwapView(self, rank)
                score = np.where(view.worst_area() <= limit, view.change_in_all(), _NEVER)
                self._try_best(view, score, 0, partial(_lowers_sum, ceiling))

    def _try_best(self, view: SwapView, score: Ints, bound: int, better: Callable[[Ints, Ints], bool]) -> bool:
        """Make the best swap by ``score`` (below ``bound``) that is ``better`` once its counts are exact."""
        flat = score.ravel()
        candidates = np.flatnonzero(flat < bound)
        if len(candidates) > _NUM_EXACT:
            candidates = candidates[np.argpartition(flat[candidates], _NUM_EXACT - 1)[:_NUM_EXACT]]
        for candidate in candidates[np.argsort(flat[candidates], kind="stable")].tolist():
            ours, theirs = view.pair(candidate)
            ranks = [view.rank, int(self.owner[theirs])]
            old = self.received[ranks].copy()
            self._exchange(ours, theirs)
            new = np.array([self._count_received(rank) for rank in ranks])
            if better(new, old):
                for rank in ranks:
                    self._refresh(rank)
                return True
            self._exchange(ours, theirs)
        return False

    def _count_received(self, rank: int) -> int:
        remote = self.needs[rank] > 0
        if self.demand.owns_columns:
            remote &= self.owner != rank
        return int(self.demand.rows[remote].sum())

    def _swap(self, a: int, b: int) -> None:
        ranks = int(self.owner[a]), int(self.owner[b])
        self._exchange(a, b)
        for rank in ranks:
            self._refresh(rank)

    def _exchange(self, a: int, b: int) -> None:
        """Swap two chunks, without bringing up to date what is derived."""
        rank_a, rank_b = int(self.owner[a]), int(self.owner[b])
        for chunk, source, target in ((a, rank_a, rank_b), (b, rank_b, rank_a)):
            for at in range(self.starts[chunk], self.starts[chunk + 1]):
                span = slice(self.demand.first[at], self.demand.last[at])
                self.needs[source, span] -= 1
                self.needs[target, span] += 1
            self.area[source] -= self.demand.areas[chunk]
            self.area[target] += self.demand.areas[chunk]
            self.owner[chunk] = target


def _lowers_sum(ceiling: int, new: Ints, old: Ints) -> bool:
    return bool(new.sum() < old.sum() and new.max() <= ceiling)


class SwapView:
    """Swaps of a chunk of ``rank`` for one of the others' chunks (``among`` ``[num_chunks]`` bool): ``[len(ours), len(theirs)]`` matrices.

    Received counts are estimates: columns that both chunks attend are counted as if the other chunk stayed.
    """

    def __init__(self, search: SwapSearch, rank: int, among: NDArray[np.bool_] | None = None) -> None:
        self.search, self.rank = search, rank
        demand = search.demand
        self.ours = ours = np.flatnonzero(search.owner == rank)
        others = search.owner != rank
        theirs = np.flatnonzero(others if among is None else others & among)
        gained = search._over_demand(search.unneeded[rank], theirs)
        given = search._over_demand(search.unneeded, ours).T  # [len(ours), num_ranks]
        if demand.owns_columns:
            gained -= np.where(search.attends_itself[theirs] | (search.needs[rank, theirs] > 0), demand.rows[theirs], 0)
            comes_home = search.attends_itself[ours][:, None] | (search.needs[:, ours].T > 0)
            given = given - np.where(comes_home, demand.rows[ours][:, None], 0)
        if len(theirs) > _NUM_THEIRS:
            nearest = np.argpartition(gained - search.freed[theirs], _NUM_THEIRS)[:_NUM_THEIRS]
            theirs, gained = theirs[nearest], gained[nearest]
        self.theirs, self.partner = theirs, search.owner[theirs]
        self.our_change = gained  # [len(theirs)], less what our chunk frees
        self.given = given

    def pair(self, flat: int) -> tuple[int, int]:
        """The chunks of an entry of the matrices, ours first."""
        row, column = divmod(flat, len(self.theirs))
        return int(self.ours[row]), int(self.theirs[column])

    def worst_area(self) -> Ints:
        """The larger area of the two ranks after the swap."""
        search, areas = self.search, self.search.demand.areas
        ours = (search.area[self.rank] - areas[self.ours])[:, None] + areas[self.theirs]
        theirs = areas[self.ours][:, None] + (search.area[self.partner] - areas[self.theirs])
        return np.maximum(ours, theirs, out=ours)

    def change_in_all(self) -> Ints:
        """How many more rows both ranks together would receive."""
        search = self.search
        change = self.given[:, self.partner]
        change += self.our_change - search.freed[self.theirs]
        change -= search.freed[self.ours][:, None]
        return change

    def worst_received(self) -> Ints:
        """The larger received count of the two ranks after the swap."""
        search = self.search
        ours = (search.received[self.rank] - search.freed[self.ours])[:, None] + self.our_change
        theirs = self.given[:, self.partner]
        theirs += search.received[self.partner] - search.freed[self.theirs]
        return np.maximum(ours, theirs, out=ours)
