"""Better dispatch by swapping chunks of two ranks, so that each keeps as many as it had.

What a rank's links carry is its *load*: the rows that it receives or those that it sends, whichever are more. Three searches: `mend` brings
areas under a limit, `relieve` lowers the largest load, `reduce` what is received in all. Every step looks at swaps of one rank's chunks
for others', by estimates, and makes the best that holds when it is counted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints
from magi_attention.plan.chunk_demand import ChunkDemand, count_needs, traffic

# The best this many swaps, by their estimated gain, are worked out exactly before one is made.
_NUM_EXACT = 4
# Of the others' chunks, the ones whose coming and going alone costs least are looked at.
_NUM_THEIRS = 256
# Once so many of the busiest ranks are helped by no swap, the others are not looked at: the largest load stays what it is.
_MOST_STUCK = 8
_NEVER = np.iinfo(np.int64).max


class SwapSearch:
    """An assignment under swaps, with what every rank computes, receives and sends kept up to date.

    ``needs``: see `count_needs`. ``unneeded``: ``[num_ranks, num_columns + 1]`` prefix sums over columns of the rows of columns that none
    of a rank's chunks attend. ``freed``: ``[num_chunks]`` rows that a chunk's rank would no longer receive without it. ``others``:
    ``[num_columns]`` ranks that need a column and do not own it. ``first``, ``last``: ``[most intervals of a chunk, num_chunks]`` what each
    chunk attends, empty intervals where it has fewer.
    """

    def __init__(self, demand: ChunkDemand, owner: Ints, num_ranks: int) -> None:
        self.demand, self.owner, self.num_ranks = demand, owner.copy(), num_ranks
        num_chunks = len(demand.areas)
        self.first, self.last = _by_chunk(demand)
        self.attends_itself = np.zeros(num_chunks, bool)
        self.attends_itself[demand.chunk[(demand.first <= demand.chunk) & (demand.chunk < demand.last)]] = True
        self.area = np.zeros(num_ranks, np.int64)
        np.add.at(self.area, owner, demand.areas)
        self.needs = count_needs(demand, owner, num_ranks)
        self.received, self.sent = traffic(demand, owner, num_ranks)
        self.others = np.count_nonzero(self.needs, axis=0)
        if demand.owns_columns:
            self.others -= self.needs[owner, np.arange(num_chunks)] > 0
        # Large arrays, so as small as they may be.
        self.rows = demand.rows.astype(np.int32) if demand.rows.sum() <= np.iinfo(np.int32).max else demand.rows
        self.unneeded = np.zeros((num_ranks, len(demand.rows) + 1), self.rows.dtype)
        self.freed = np.zeros(num_chunks, self.rows.dtype)
        for rank in range(num_ranks):
            self._refresh(rank)

    @property
    def load(self) -> Ints:
        """``[num_ranks]``: rows received or sent, whichever are more."""
        return np.maximum(self.received, self.sent)

    def _refresh(self, rank: int) -> None:
        """Bring what is derived from ``needs`` and ``owner`` up to date, for one rank."""
        demand, needs, unneeded = self.demand, self.needs[rank], self.unneeded[rank]
        chunks = np.flatnonzero(self.owner == rank)
        alone = needs == 1
        if demand.owns_columns:
            alone[chunks] = False
        np.cumsum(self.rows * (needs == 0), out=unneeded[1:])
        self.freed[chunks] = self.over_demand(np.append(0, np.cumsum(self.rows * alone)), chunks)
        if demand.owns_columns:  # a column that leaves with its chunk must be received, if others need it
            self.freed[chunks] -= np.where(needs[chunks] > 1, demand.rows[chunks], 0)

    def over_demand(self, prefix: Ints, chunks: Ints | slice) -> Ints:
        """``[num_columns + 1]`` prefix sums to ``[len(chunks)]``: their sum over the columns of each chunk."""
        total: Ints = prefix[self.last[0, chunks]] - prefix[self.first[0, chunks]]
        for first, last in zip(self.first[1:], self.last[1:], strict=True):
            total += prefix[last[chunks]] - prefix[first[chunks]]
        return total

    def unneeded_by(self, ranks: Ints, chunks: Ints) -> Ints:
        """``[len(chunks), len(ranks)]``: the rows of each chunk's columns that no chunk of a rank attends."""
        total = np.zeros((len(chunks), len(ranks)), np.int64)
        for first, last in zip(self.first, self.last, strict=True):
            total += self.unneeded[ranks, last[chunks][:, None]]
            total -= self.unneeded[ranks, first[chunks][:, None]]
        return total

    def mend(self, area_limit: int, num_swaps: int) -> None:
        """Bring ranks under the area limit, heaviest first; a rank that no swap helps is left."""
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
                # Of those that fit, the fewest rows more; not by loading anybody beyond the busiest, if that can be.
                easy = fits & (view.worst_load() <= self.load.max())
                score = np.where(easy if easy.any() else fits, view.change_in_all(), _NEVER)
            else:  # no swap fits: take the largest step down
                score = np.where(worst < self.area[rank], worst, _NEVER)
            best = int(np.argmin(score)) if score.size else -1
            if best < 0 or score.flat[best] == _NEVER:
                stuck[rank] = True
            else:
                self._swap(*view.pair(best))

    def relieve(self, area_limit: int, num_swaps: int) -> None:
        """Swap away from the rank of the largest load, while that lowers the larger load of a pair; then it is left."""
        limit = max(area_limit, int(self.area.max()))
        stuck = np.zeros(self.num_ranks, bool)
        for _ in range(num_swaps):
            load = self.load
            busiest = int(np.argmax(np.where(stuck, -1, load)))
            if stuck[busiest] or np.count_nonzero(stuck) > _MOST_STUCK:
                return
            view = SwapView(self, busiest)
            before, ceiling = int(load[busiest]), int(load.max())
            score = np.where(view.worst_area() <= limit, view.worst_load(), _NEVER)

            def better(pair: list[int], before: int = before, ceiling: int = ceiling) -> bool:
                after = self.load
                return bool(after[pair].max() < before and after.max() <= ceiling)

            stuck[busiest] = not self._try_best(view, score, before, better)

    def reduce(self, area_limit: int, most: int) -> None:
        """For the ``most`` ranks of the largest load, the swap after which fewest rows are received and no load tops the largest."""
        limit = max(area_limit, int(self.area.max()))
        ceiling = int(self.load.max())
        for rank in np.argsort(-self.load, kind="stable")[:most].tolist():
            view = SwapView(self, rank)
            fits = (view.worst_area() <= limit) & (view.worst_load() <= ceiling)
            score = np.where(fits, view.change_in_all(), _NEVER)
            before = int(self.received.sum())

            def better(_: list[int], before: int = before) -> bool:
                return bool(self.received.sum() < before and self.load.max() <= ceiling)

            self._try_best(view, score, 0, better)

    def _try_best(self, view: SwapView, score: Ints, bound: int, better: Callable[[list[int]], bool]) -> bool:
        """Make the best swap by ``score`` (below ``bound``) that is ``better`` for its two ranks once it is made."""
        flat = score.ravel()
        for candidate in smallest(flat, _NUM_EXACT, bound):
            ours, theirs = view.pair(candidate)
            ranks = [view.rank, int(self.owner[theirs])]
            self._exchange(ours, theirs)
            if better(ranks):
                for rank in ranks:
                    self._refresh(rank)
                return True
            self._exchange(ours, theirs)
        return False

    def _swap(self, a: int, b: int) -> None:
        ranks = int(self.owner[a]), int(self.owner[b])
        self._exchange(a, b)
        for rank in ranks:
            self._refresh(rank)

    def _exchange(self, a: int, b: int) -> None:
        """Swap two chunks, and count what moves anew; what `_refresh` derives is left as it was."""
        ranks = int(self.owner[a]), int(self.owner[b])
        self._move(a, *ranks)
        self._move(b, *ranks[::-1])

    def _move(self, chunk: int, source: int, target: int) -> None:
        demand = self.demand
        for begin, end in zip(self.first[:, chunk].tolist(), self.last[:, chunk].tolist(), strict=True):
            span = slice(begin, end)
            lost, won = self.needs[source, span] == 1, self.needs[target, span] == 0
            if demand.owns_columns:
                owner = self.owner[span]
                lost &= owner != source
                won &= owner != target
            rows = demand.rows[span]
            self.received[source] -= rows[lost].sum()
            self.received[target] += rows[won].sum()
            change = won.astype(np.int64) - lost
            self.others[span] += change
            if demand.owns_columns:
                np.add.at(self.sent, owner, change * rows)
            self.needs[source, span] -= 1
            self.needs[target, span] += 1
        if demand.owns_columns:
            rows_here = demand.rows[chunk]
            self.sent[source] -= self.others[chunk] * rows_here
            for rank, sign in ((source, 1), (target, -1)):  # one must receive it from now on, the other no more
                if self.needs[rank, chunk] > 0:
                    self.received[rank] += sign * rows_here
                    self.others[chunk] += sign
            self.sent[target] += self.others[chunk] * rows_here
        self.area[source] -= demand.areas[chunk]
        self.area[target] += demand.areas[chunk]
        self.owner[chunk] = target


def smallest(values: Ints, most: int, bound: int) -> list[int]:
    """Where the ``most`` smallest of ``values`` under ``bound`` stand: by value, equal ones by index."""
    found: list[int] = []
    values = values.copy()
    while len(found) < most and values.size:
        at = int(np.argmin(values))  # the first of equal ones
        if values[at] >= bound:
            break
        found.append(at)
        values[at] = _NEVER
    return found


def _by_chunk(demand: ChunkDemand) -> tuple[Ints, Ints]:
    """``[most, num_chunks]`` each: where the first, second, ... interval of every chunk begins and ends; 0 and 0 where it has none."""
    count = np.bincount(demand.chunk, minlength=len(demand.areas))
    which = np.arange(len(demand.chunk)) - (np.cumsum(count) - count)[demand.chunk]
    first, last = (np.zeros((max(int(count.max(initial=0)), 1), len(count)), np.int64) for _ in range(2))
    first[which, demand.chunk], last[which, demand.chunk] = demand.first, demand.last
    return first, last


def least(values: Ints, most: int, unit: int) -> Ints:
    """Where the ``most`` smallest of ``values`` stand, told apart by ``unit``: by value, equal ones by index."""
    steps = (values - values.min()) // unit
    # Numbers of two bytes are sorted by radix, in a few passes; farther values than those tell apart are equal.
    return np.argsort(np.minimum(steps, np.iinfo(np.uint16).max).astype(np.uint16), kind="stable")[:most]


class SwapView:
    """Swaps of a chunk of ``rank`` for one of the others' chunks (``among`` ``[num_chunks]`` bool): ``[len(ours), len(theirs)]`` matrices.

    Loads are estimates: columns that both chunks attend are counted as if the other chunk stayed, and so is everybody else's need of the
    two chunks' own columns.
    """

    def __init__(self, search: SwapSearch, rank: int, among: NDArray[np.bool_] | None = None) -> None:
        self.search, self.rank = search, rank
        demand, needs = search.demand, search.needs
        is_ours = search.owner == rank
        self.ours = ours = np.flatnonzero(is_ours)
        gained = search.over_demand(search.unneeded[rank], slice(None))  # of all chunks
        if demand.owns_columns:
            gained -= search.rows * (search.attends_itself | (needs[rank] > 0))
        theirs = np.flatnonzero(~is_ours if among is None else among & ~is_ours)
        if len(theirs) > _NUM_THEIRS:
            theirs = theirs[least((gained - search.freed)[theirs], _NUM_THEIRS, unit=int(demand.rows[0]))]
        gained = gained[theirs].astype(np.int64)
        self.theirs, self.partner = theirs, search.owner[theirs]
        self.our_change = gained  # [len(theirs)], less what our chunk frees
        self.given = search.unneeded_by(self.partner, ours)  # the rows that a partner would receive for our chunk
        if demand.owns_columns:
            self.known = needs[np.ix_(self.partner, ours)].T > 0  # whether a partner needs our chunk's column
            comes_home = search.attends_itself[ours][:, None] | self.known
            self.given -= np.where(comes_home, demand.rows[ours][:, None], 0)

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
        change = self.given + (self.our_change - search.freed[self.theirs])
        change -= search.freed[self.ours][:, None]
        return change

    def worst_load(self) -> Ints:
        """The larger load of the two ranks after the swap."""
        search = self.search
        worst = (search.received[self.rank] - search.freed[self.ours])[:, None] + self.our_change
        theirs = self.given + (search.received[self.partner] - search.freed[self.theirs])
        np.maximum(worst, theirs, out=worst)
        if search.demand.owns_columns:
            self._raise_to_sent(worst)
        return worst

    def _raise_to_sent(self, worst: Ints) -> None:
        """Raise ``worst``, in place, to what either rank would send."""
        search, rows = self.search, self.search.demand.rows
        asked = search.others
        ours, theirs, partner = self.ours, self.theirs, self.partner
        # A column that moves is asked for by its old rank if that still needs it, and no more by its new one.
        kept_by_us = search.needs[self.rank, ours] > search.attends_itself[ours]
        kept_by_them = search.needs[partner, theirs] > search.attends_itself[theirs]
        arriving = rows[theirs] * (asked[theirs] + kept_by_them - (search.needs[self.rank, theirs] > 0))
        leaving = asked[ours] + kept_by_us
        we_send = (search.sent[self.rank] - rows[ours] * asked[ours])[:, None] + arriving
        np.maximum(worst, we_send, out=worst)
        they_send = rows[ours][:, None] * (leaving[:, None] - self.known)
        they_send += search.sent[partner] - rows[theirs] * asked[theirs]
        np.maximum(worst, they_send, out=worst)
