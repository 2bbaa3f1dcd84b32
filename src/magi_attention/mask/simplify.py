"""Fewer rows for the same cells.

The *hull* of two rows is the smallest row that holds both: the lower of each lower bound and the upper of each upper one. Two disjoint
rows are one row exactly when their hull has as many cells as they have:

    ##...     ##...                    ###.     ###.
    .##..     .##..                    ###.     ###+
    -----  -> ..##.   8 = 4 + 4        ----  -> .+##   10 > 6 + 2
    ..##.     ...##                    ..##
    ...##

So no merge is looked at by kind. Which pairs to look at: two rows that merge are neighbours along queries, along keys or across a
diagonal, and share what bounds them on the two other sides. On each of these sides that is one of two numbers (where a side is level,
the edge of its rectangle; where it is slanted, its diagonal), which makes four orders for each of the three directions; in one of the
twelve the two rows stand next to each other.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from magi_attention.mask.bands import HI, K0, K1, LO, Q0, Q1, Ints, area, check_disjoint, expand, find_overlap, tighten

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask

# Pairs of rows looked at together: bounds the memory, not the result.
_PAIRS_AT_ONCE = 1 << 20

# (columns that merging rows share, column in which they follow each other, column of the first that tells where the second begins)
_ORDERS = [
    *((keys, Q0, Q1) for keys in itertools.product((K0, LO), (K1, HI))),
    *((keys, K0, K1) for keys in itertools.product((Q0, HI), (Q1, LO))),
    *((keys, LO, HI) for keys in itertools.product((Q0, K0), (Q1, K1))),
]


def simplify(mask: AttnMask) -> AttnMask:
    """The same cells in fewer rows: no two rows of the result are one row.

    Rows nested in another row are dropped; rows that make one are merged, again and again until none do. Any cutting of one row
    by queries or by keys comes back as that row. The result is ordered by query, then key. Time grows as ``n log n`` of the rows.

    Raises:
        ValueError: two rows share some of their cells, neither being nested in the other; the message names the rows and a cell.
    """
    from magi_attention.mask.attn_mask import AttnMask  # which offers this as a method

    return AttnMask(merge_bands(_disjoint(mask.bands)), mask.num_q, mask.num_k)


def merge_bands(bands: Ints) -> Ints:
    """Merge rows of a tight table, whose cells are disjoint, until no two of them are one row."""
    quiet = 0
    for keys, begin, end in itertools.cycle(_ORDERS):
        before = len(bands)
        bands = _merge_along(bands, keys, begin, end)
        quiet = quiet + 1 if len(bands) == before else 0
        if quiet == len(_ORDERS):
            return bands[np.lexsort((bands[:, K0], bands[:, Q0]))]
    raise AssertionError("unreachable")


def _merge_along(bands: Ints, keys: tuple[int, int], begin: int, end: int) -> Ints:
    """Merge rows that stand next to each other in one order, until none of those do."""
    bands = bands[np.lexsort((bands[:, begin], bands[:, keys[1]], bands[:, keys[0]]))]
    step = 1 if begin == LO else 0  # diagonals are inclusive at both ends
    while True:
        first, second = bands[:-1], bands[1:]
        near = np.flatnonzero(
            (first[:, keys[0]] == second[:, keys[0]])
            & (first[:, keys[1]] == second[:, keys[1]])
            & (first[:, end] + step >= second[:, begin])
        )
        joined = hull(bands[near], bands[near + 1])
        fits = area(joined) == area(bands[near]) + area(bands[near + 1])
        near, joined = near[fits], joined[fits]
        if not len(near):
            return bands
        # Of a run of rows that could all merge with the next, every other one does, so that no row merges twice at once.
        opens = np.diff(near, prepend=-2) != 1
        place = np.arange(len(near)) - np.flatnonzero(opens)[np.cumsum(opens) - 1]
        chosen = place % 2 == 0
        bands[near[chosen]] = joined[chosen]
        kept = np.ones(len(bands), bool)
        kept[near[chosen] + 1] = False
        bands = bands[kept]


def hull(first: Ints, second: Ints) -> Ints:
    """``[n, 6]``: the smallest tight rows that hold both rows of each pair, cells of neither among them perhaps."""
    both = np.where(np.arange(6) % 2 == 0, np.minimum(first, second), np.maximum(first, second))
    return tighten(both)[0]


def _disjoint(bands: Ints) -> Ints:
    """Without the rows that are nested in another; ValueError where cells are still listed twice."""
    if find_overlap(bands) is None:
        return bands
    bands = bands[np.sort(np.unique(bands, axis=0, return_index=True)[1], kind="stable")]  # of equal rows, one
    nested = np.zeros(len(bands), bool)
    order = np.argsort(bands[:, Q0], kind="stable")
    ordered = bands[order]
    count = np.searchsorted(ordered[:, Q0], ordered[:, Q1], side="left") - np.arange(len(bands)) - 1
    block = np.cumsum(count) // _PAIRS_AT_ONCE
    for at in np.flatnonzero(np.diff(block, prepend=-1)):
        stop = np.searchsorted(block, block[at], side="right")
        left, right = expand(np.arange(at, stop) + 1, count[at:stop])
        left = left + at
        a, b = ordered[left], ordered[right]
        shared, meeting = tighten(np.where(np.arange(6) % 2 == 0, np.maximum(a, b), np.minimum(a, b)))
        left, right, cells = left[meeting], right[meeting], area(shared)
        nested[order[right[cells == area(ordered[right])]]] = True
        nested[order[left[cells == area(ordered[left])]]] = True
    bands = bands[~nested]
    check_disjoint(bands)
    return bands
