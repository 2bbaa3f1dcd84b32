"""Better dispatch by swapping chunks of two ranks, so that each keeps as many as it had.

What a rank's links carry is its *load*: the rows that it receives or those that it sends, whichever are more. Three searches: `mend` brings
areas under a limit, `relieve` lowers the largest load, `reduce` what is received in all. Every step looks at all swaps of one rank's chunks
for others', by estimates, and makes the best that holds when it is counted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints, expand
from magi_attention.plan.chunk_demand import ChunkDemand, count_needs, traffic

# The best this many swaps, by their estimated gain, are worked out exactly before one is made.
_NUM_EXACT = 4
# Of the others' chunks, the ones whose coming and going alone costs least are looked at.
_NUM_THEIRS = 256
_NEVER = np.iinfo(np.int64).max


class SwapSearch:
    """An assignment under swaps, with what every rank computes, receives and sends kept up to date.

    ``needs``: see `count_needs`. ``unneeded``, ``lone``: ``[num_ranks, num_columns + 1]`` int64 prefix sums over columns of the rows of
    columns that none, and that exactly one, of a rank's chunks attend. ``freed``: ``[num_chunks]`` rows that a chunk's rank would no longer
    receive without it. ``others``: ``[num_columns]`` ranks that need a column and do not own it.
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
        self.received, self.sent = traffic(demand, owner, num_ranks)
        self.others = (self.needs > 0).sum(axis=0)
        if demand.owns_columns:
            self.others -= self.needs[owner, np.arange(num_chunks)] > 0
        self.unneeded = np.zeros((num_ranks, len(demand.rows) + 1), np.int64)
        self.lone = np.zeros((num_ranks, len(demand.rows) + 1), np.int64)
        self.freed = np.zeros(num_chunks, np.int64)
        for rank in range(num_ranks):
            self._refresh(rank)

    @property
    def load(self) -> Ints:
        """``[num_ranks]``: rows received or sent, whichever are more."""
        return np.maximum(self.received, self.sent)

    def _refresh(self, rank: int) -> None:
        """Bring what is derived from ``needs`` and ``owner`` up to date, for one rank."""
        demand, needs = self.demand, self.needs[rank]
        rows = demand.rows
        chunks = np.flatnonzero(self.owner == rank)
        alone = needs == 1
        if demand.owns_columns:
            alone[chunks] = False
        np.cumsum(rows * (needs == 0), out=self.unneeded[rank, 1:])
        np.cumsum(rows * alone, out=self.lone[rank, 1:])
        self.freed[chunks] = self.over_demand(self.lone[rank], chunks)
        if demand.owns_columns:  # a column that leaves with its chunk must be received, if others need it
            self.freed[chunks] -= np.where(needs[chunks] > 1, rows[chunks], 0)

    def over_demand(self, prefix: Ints, chunks: Ints) -> Ints:
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
            if stuck[busiest]:
                return
            view = SwapView(self, busiest)
            before, ceiling = int(load[busiest]), int(load.max())
            score = np.where(view.worst_area() <= limit, view.worst_load(), _NEVER)

            def better(pair: list[int], before: int = before, ceiling: int = ceiling) -> bool:
                after = self.load
                return bool(after[pair].max() < before and after.max() <= ceiling)

            stuck[busiest] = not self._try_best(view, score, before, better)

    def reduce(self, area_limit: int, num_rounds: int) -> None:
        """For every rank, those of the largest load first, the swap after which fewest rows are received and no load tops the largest."""
        limit = max(area_limit, int(self.area.max()))
        for _ in range(num_rounds):
            ceiling = int(self.load.max())
            for rank in np.argsort(-self.load, kind="stable").tolist():
                view = SwapView(self, rank)
                fits = (view.worst_area() <= limit) & (view.worst_load() <= ceiling)
                score = np.where(fits, view.change_in_all(), _NEVER)
                before = int(self.received.sum())

                def better(_: list[int], before: int = before, ceiling: int = ceiling) -> bool:
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
        demand, ranks = self.demand, [int(self.owner[a]), int(self.owner[b])]
        before = self._remote(ranks)
        for chunk, source, target in ((a, *ranks), (b, *ranks[::-1])):
            for at in range(self.starts[chunk], self.starts[chunk + 1]):
                span = slice(demand.first[at], demand.last[at])
                self.needs[source, span] -= 1
                self.needs[target, span] += 1
            self.area[source] -= demand.areas[chunk]
            self.area[target] += demand.areas[chunk]
            self.owner[chunk] = target
        after = self._remote(ranks)
        self.others += after.sum(axis=0) - before.sum(axis=0)
        self.received[ranks] = after @ demand.rows
        if demand.owns_columns:
            sent = np.bincount(self.owner, weights=self.others * demand.rows, minlength=self.num_ranks)
            self.sent = sent.astype(np.int64)

    def _remote(self, ranks: list[int]) -> NDArray[np.bool_]:
        """``[len(ranks), num_columns]``: the columns that these ranks need and do not own."""
        remote = self.needs[ranks] > 0
        if self.demand.owns_columns:
            for at, rank in enumerate(ranks):
                remote[at, self.owner == rank] = False
        return remote


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


class SwapView:
    """Swaps of a chunk of ``rank`` for one of the others' chunks (``among`` ``[num_chunks]`` bool): ``[len(ours), len(theirs)]`` matrices.

    Loads are estimates: columns that both chunks attend are counted as if the other chunk stayed, and so is everybody else's need of the
    two chunks' own columns.
    """

    def __init__(self, search: SwapSearch, rank: int, among: NDArray[np.bool_] | None = None) -> None:
        self.search, self.rank = search, rank
        demand = search.demand
        self.ours = ours = np.flatnonzero(search.owner == rank)
        others = search.owner != rank
        theirs = np.flatnonzero(others if among is None else others & among)
        gained = search.over_demand(search.unneeded[rank], theirs)
        given = search.over_demand(search.unneeded, ours).T  # [len(ours), num_ranks]
        if demand.owns_columns:
            gained -= np.where(search.attends_itself[theirs] | (search.needs[rank, theirs] > 0), demand.rows[theirs], 0)
            comes_home = search.attends_itself[ours][:, None] | (search.needs[:, ours].T > 0)
            given = given - np.where(comes_home, demand.rows[ours][:, None], 0)
        if len(theirs) > _NUM_THEIRS:
            nearest = np.argsort(gained - search.freed[theirs], kind="stable")[:_NUM_THEIRS]
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

    def worst_load(self) -> Ints:
        """The larger load of the two ranks after the swap."""
        search = self.search
        worst = (search.received[self.rank] - search.freed[self.ours])[:, None] + self.our_change
        theirs = self.given[:, self.partner]
        theirs += search.received[self.partner] - search.freed[self.theirs]
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
        known = search.needs[:, ours].T > 0  # [len(ours), num_ranks]
        they_send = (rows[ours][:, None] * (leaving[:, None] - known))[:, partner]
        they_send += search.sent[partner] - rows[theirs] * asked[theirs]
        np.maximum(worst, they_send, out=worst)
