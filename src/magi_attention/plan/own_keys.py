"""Which keys a rank holds, asked by position: counts, sums of counts, cells; for many pairs of rank and position at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints, expand
from magi_attention.plan.layout import ShardLayout


class OwnKeys:
    """How many keys a rank owns below a position, and the sum of that over positions: quadratic between the ends of runs.

    Every method takes as many ranks as positions, and answers for each pair.
    """

    def __init__(self, layout: ShardLayout) -> None:
        runs = layout.runs[np.lexsort((layout.runs[:, 0], layout.runs[:, 2]))]
        self.start, end, self.rank, self.before = runs.T
        self.length = end - self.start
        self.stride = layout.padded_seqlen + 1
        self.keyed = self.rank * self.stride + self.start
        self.keyed_rows = self.rank * self.stride + self.before
        # sum_below at the start of each run: over the run before it, and the gap between them; anew for each rank.
        gap = np.append(self.start[1:], 0) - end
        grown = self.before * self.length + self.length * (self.length - 1) // 2 + (self.before + self.length) * gap
        total = np.cumsum(grown) - grown
        opens = np.flatnonzero(np.diff(self.rank, prepend=-1))
        group = np.cumsum(np.diff(self.rank, prepend=-1) != 0) - 1
        self.total = total - total[opens][group]

    def _locate(self, rank: Ints, position: Ints) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """The last run of ``rank`` that starts at or before a position, how far behind its start that is, and whether there is one."""
        at = np.searchsorted(self.keyed, rank * self.stride + position, side="right") - 1
        found = (at >= 0) & (self.rank[at] == rank)
        return at, position - self.start[at], found

    def below(self, rank: Ints, position: Ints) -> Ints:
        """Keys of ``rank`` at positions under ``position``: the local row of the first one that is not."""
        at, past, found = self._locate(rank, position)
        return np.where(found, self.before[at] + np.minimum(past, self.length[at]), 0)

    def sum_below(self, rank: Ints, position: Ints) -> Ints:
        """The sum of `below` over positions ``[0, position)``."""
        at, past, found = self._locate(rank, position)
        inside = np.minimum(past, self.length[at])
        rising = self.before[at] * inside + inside * (inside - 1) // 2
        level = (self.before[at] + self.length[at]) * (past - inside)
        return np.where(found, self.total[at] + rising + level, 0)

    def positions(self, rank: Ints, row: Ints) -> Ints:
        """The global position of local rows that the ranks hold."""
        at = np.searchsorted(self.keyed_rows, rank * self.stride + row, side="right") - 1
        result: Ints = self.start[at] + row - self.before[at]
        return result

    def cut_rows(self, rank: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
        """Local row intervals, cut where their positions jump: ``(interval [n], begin [n], end [n])`` in global positions."""
        first = np.searchsorted(self.keyed_rows, rank * self.stride + begin, side="right") - 1
        last = np.searchsorted(self.keyed_rows, rank * self.stride + end, side="left")
        interval, run = expand(first, last - first)
        by = self.start[run] - self.before[run]
        begins = np.maximum(begin[interval], self.before[run]) + by
        return interval, begins, np.minimum(end[interval], self.before[run] + self.length[run]) + by

    def cells(self, rank: Ints, pieces: Ints) -> Ints:
        """``[p]``: cells of tight rows whose keys the rank, one for each row, owns."""
        q0, q1, k0, k1, lo, hi = pieces.T
        # As `area`, with the keys that the rank owns up to a position in place of the position itself.
        num_slanted = np.clip(k1 - hi - 1 - q0, 0, q1 - q0)
        right = self.sum_below(rank, q0 + num_slanted + hi + 1) - self.sum_below(rank, q0 + hi + 1)
        right += (q1 - q0 - num_slanted) * self.below(rank, k1)
        num_level = np.clip(k0 - lo - q0, 0, q1 - q0)
        left = self.sum_below(rank, q1 + lo) - self.sum_below(rank, q0 + num_level + lo)
        left += num_level * self.below(rank, k0)
        result: Ints = right - left
        return result
