"""Which rows each rank must receive, from whom: for all ranks at once.

rank's queries attend keys   ....#######......####....
who owns the keys            0000011111222220000111112
what it receives (rank 0)         11122       1111          rows of its own are dropped
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import K0, K1, Ints, expand, split_q
from magi_attention.plan.exchange import Exchange
from magi_attention.plan.layout import ShardLayout

# Columns of a transfer table: rows [BEGIN, END) of the global k sequence go from rank SRC, where they begin at local row
# SRC_LOCAL, to rank DST, in remote stage STAGE.
STAGE, DST, SRC, BEGIN, END, SRC_LOCAL = range(6)


def demanded_intervals(bands: Ints, q_layout: ShardLayout) -> Ints:
    """``[n, 3]`` rows ``(rank, k_begin, k_end)``: the keys that each rank's queries attend, disjoint and ascending."""
    pieces, _, run = split_q(bands, q_layout.runs[:, 0], q_layout.runs[:, 1])
    return union_by_group(q_layout.runs[run, 2], pieces[:, K0], pieces[:, K1])


def union_by_group(group: Ints, begin: Ints, end: Ints) -> Ints:
    """``[n, 3]`` rows ``(group, begin, end)``: the union of each group's intervals, disjoint, ascending; touching ones are joined."""
    if not len(group):
        return np.empty((0, 3), np.int64)
    stride = int(end.max()) + 1  # one more than any end, so that intervals of different groups never touch
    keyed_begin, keyed_end = group * stride + begin, group * stride + end
    order = np.argsort(keyed_begin, kind="stable")
    keyed_begin, reach = keyed_begin[order], np.maximum.accumulate(keyed_end[order])
    first = np.flatnonzero(np.append(True, keyed_begin[1:] > reach[:-1]))
    last = np.append(first[1:], len(order)) - 1
    which = keyed_begin[first] // stride
    return np.stack([which, keyed_begin[first] - which * stride, reach[last] - which * stride], axis=1)


def split_by_owner(intervals: Ints, k_layout: ShardLayout, *, remote_only: bool = False) -> Ints:
    """A transfer table (stage 0) of ``(rank, k_begin, k_end)`` rows, each cut where the owner changes; own rows included or dropped.

    Ordered by DST, SRC, BEGIN, which is the order of rows in DST's receive buffer.
    """
    rank, begin, end = intervals.T
    runs = k_layout.runs
    first = np.searchsorted(runs[:, 1], begin, side="right")
    count = np.searchsorted(runs[:, 0], end, side="left") - first
    row, run = expand(first, count)
    destination, source = _small(rank, k_layout.num_ranks)[row], _small(runs[:, 2], k_layout.num_ranks)[run]
    if remote_only:
        remote = destination != source
        row, run, destination, source = row[remote], run[remote], destination[remote], source[remote]
    order = np.lexsort((source, destination))
    row, run = row[order], run[order]
    # Filled column by column: there may be tens of millions of rows.
    table = np.zeros((len(row), 6), np.int64)
    table[:, DST], table[:, SRC] = destination[order], source[order]
    np.maximum(begin[row], runs[run, 0], out=table[:, BEGIN])
    np.minimum(end[row], runs[run, 1], out=table[:, END])
    table[:, SRC_LOCAL] = (runs[:, 3] - runs[:, 0])[run]
    table[:, SRC_LOCAL] += table[:, BEGIN]
    return table


def _small(ranks: Ints, num_ranks: int) -> NDArray[np.integer[Any]]:
    """The same in two bytes where they fit: numbers of two bytes are sorted by radix, in a few passes."""
    return ranks.astype(np.uint16) if num_ranks <= 1 << 16 else ranks


def remote_transfers(bands: Ints, q_layout: ShardLayout, k_layout: ShardLayout) -> Ints:
    """The transfer table of exactly the distinct rows that each rank attends and does not own."""
    return split_by_owner(demanded_intervals(bands, q_layout), k_layout, remote_only=True)


def num_rows(table: Ints) -> int:
    """How many rows a transfer table moves in all."""
    return int((table[:, END] - table[:, BEGIN]).sum())


def rows_by_rank(table: Ints, column: int, num_ranks: int) -> Ints:
    """``[num_ranks]``: rows of a transfer table, counted by the ranks in ``column`` (SRC or DST)."""
    counts = np.zeros(num_ranks, np.int64)
    np.add.at(counts, table[:, column], table[:, END] - table[:, BEGIN])
    return counts


@dataclass(frozen=True, eq=False)
class ByRank:
    """A transfer table, its entries found by who sends and by who receives them: sorted once, then a slice a rank."""

    table: Ints
    sent_order: Ints
    sent_bounds: Ints
    received_order: Ints
    received_bounds: Ints

    @classmethod
    def of(cls, table: Ints, num_ranks: int) -> ByRank:
        """Of any transfer table; entries keep their order."""
        return cls(table, *_grouped(table[:, SRC], num_ranks), *_grouped(table[:, DST], num_ranks))

    def sent(self, rank: int) -> Ints:
        """The entries that ``rank`` sends, in the table's order."""
        return self.table[self.sent_order[self.sent_bounds[rank] : self.sent_bounds[rank + 1]]]

    def received(self, rank: int) -> Ints:
        """The entries that ``rank`` receives, in the table's order."""
        return self.table[self.received_order[self.received_bounds[rank] : self.received_bounds[rank + 1]]]


def _grouped(ranks: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    bounds = np.append(0, np.cumsum(np.bincount(ranks, minlength=num_ranks)))
    return np.argsort(_small(ranks, num_ranks), kind="stable"), bounds


def exchange_of(sent: Ints, received: Ints, num_ranks: int) -> Exchange:
    """One rank's part in carrying out a transfer table: what it sends, ordered by DST, SRC, BEGIN, and what it receives."""
    return Exchange(
        send_ranges=np.stack([sent[:, SRC_LOCAL], sent[:, SRC_LOCAL] + sent[:, END] - sent[:, BEGIN]], axis=1),
        send_splits=tuple(rows_by_rank(sent, DST, num_ranks).tolist()),
        recv_splits=tuple(rows_by_rank(received, SRC, num_ranks).tolist()),
    )
