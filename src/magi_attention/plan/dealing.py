"""Cutting transfer tables, and dealing their rows evenly to stages.

A dealing is a transfer table (see ``plan.demand``) with its STAGE column filled, ordered by stage, destination, source, position.
"""

from __future__ import annotations

import numpy as np

from magi_attention.mask.bands import Ints, expand
from magi_attention.plan.demand import BEGIN, DST, END, SRC, SRC_LOCAL, STAGE


def split_uniform(table: Ints, num_stages: int) -> Ints:
    """Deal every (destination, source) pair's rows evenly to ``num_stages`` stages, in ascending order.

    Every stage then asks the same of every link. Ordered by STAGE, DST, SRC, BEGIN.
    """
    if num_stages <= 1 or not len(table):
        return table
    length = table[:, END] - table[:, BEGIN]
    first_of_pair = np.append(True, np.any(np.diff(table[:, [DST, SRC]], axis=0) != 0, axis=1))
    pair = np.cumsum(first_of_pair) - 1
    before = np.cumsum(length) - length
    offset = before - before[first_of_pair][pair]  # rows of the same pair ahead of this entry
    total = np.zeros(pair[-1] + 1, np.int64)
    np.add.at(total, pair, length)
    total = total[pair]
    # Stage s takes a pair's rows [total * s // n, total * (s + 1) // n).
    first = (num_stages * (offset + 1) - 1) // total
    last = (num_stages * (offset + length) - 1) // total
    row, stage = expand(first, last - first + 1)
    cut_begin = np.maximum(offset[row], total[row] * stage // num_stages) - offset[row]
    cut_end = np.minimum((offset + length)[row], total[row] * (stage + 1) // num_stages) - offset[row]
    parts = cut_entries(table, row, cut_begin, cut_end)
    parts[:, STAGE] = stage
    return in_order(parts[cut_begin < cut_end])


def cut_entries(table: Ints, row: Ints, begin: Ints, end: Ints) -> Ints:
    """Rows ``[begin, end)`` of entries ``row`` of a transfer table, counted from each entry's own beginning."""
    parts = table[row]
    parts[:, END] = parts[:, BEGIN] + end
    parts[:, BEGIN] += begin
    parts[:, SRC_LOCAL] += begin
    return parts


def in_order(table: Ints) -> Ints:
    return table[np.lexsort((table[:, BEGIN], table[:, SRC], table[:, DST], table[:, STAGE]))]
