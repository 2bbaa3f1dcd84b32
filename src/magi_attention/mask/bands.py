"""The band table: every mask as rows of rectangle and diagonal band.

A row is ``(q0, q1, k0, k1, lo, hi)``: cell ``(i, j)`` is attended when ``q0 <= i < q1``, ``k0 <= j < k1`` and ``lo <= j - i <= hi``.

    k0        k1
    ......####..   q0        lo, hi bound the diagonals j - i;
    .....####...             cutting a row anywhere, or moving it,
    ....####....   q1        leaves one row of the same kind.

All tables here are ``[n, 6]`` int64 and *tight*: each of a row's queries and keys attends or is attended in it, and ``lo``, ``hi``
are no wider than the rectangle. A slice that attends nothing has no row. Only `to_dense`
loops over rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

Q0, Q1, K0, K1, LO, HI = range(6)
FULL, CAUSAL, INVCAUSAL, BICAUSAL = range(4)

# Pairs of rows compared at once when looking for cells listed twice: bounds the memory, not the result.
_PAIRS_AT_ONCE = 1 << 20


def empty_bands() -> Ints:
    return np.empty((0, 6), np.int64)


def tighten(bands: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Shrink every row to what it attends.

    Returns the tight rows that attend something, and ``[n]`` bool: which of the given rows those are.
    """
    q0, q1, k0, k1, lo, hi = bands.T
    q0, q1 = np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo)
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    kept = (q0 < q1) & (k0 < k1) & (lo <= hi)
    tight = np.stack([q0, q1, k0, k1, np.maximum(lo, k0 - q1 + 1), np.minimum(hi, k1 - 1 - q0)], axis=1)
    return tight[kept], kept


def bands_from_slices(q_ranges: Ints, k_ranges: Ints, types: Ints) -> Ints:
    """Rows of slices: ``q_ranges``, ``k_ranges`` ``[n, 2]``, ``types`` ``[n]`` in 0..3 (full, causal, inv_causal, bi_causal)."""
    q_ranges, k_ranges = np.asarray(q_ranges, np.int64).reshape(-1, 2), np.asarray(k_ranges, np.int64).reshape(-1, 2)
    types = np.asarray(types, np.int64).reshape(-1)
    (q0, q1), (k0, k1) = q_ranges.T, k_ranges.T
    upper = (types == CAUSAL) | (types == BICAUSAL)
    lower = (types == INVCAUSAL) | (types == BICAUSAL)
    lo = np.where(lower, k0 - q0, k0 - q1 + 1)
    hi = np.where(upper, k1 - q1, k1 - 1 - q0)
    return tighten(np.stack([q0, q1, k0, k1, lo, hi], axis=1))[0]


def slices_from_bands(bands: Ints) -> tuple[Ints, Ints, Ints]:
    """The same cells as slices of the four types: ``(q_ranges [m, 2], k_ranges [m, 2], types [m])``, at most three a row.

    Walking down a row's queries, its left end is level (at ``k0``) until the lower diagonal reaches it, then slants; its right end
    slants until it reaches ``k1``, then is level. Between those two turns both ends are of one kind, which is one slice.
    """
    q0, q1, k0, k1, lo, hi = bands.T
    left_turn, right_turn = _turns(bands)
    cuts = np.stack([q0, np.minimum(left_turn, right_turn), np.maximum(left_turn, right_turn), q1], axis=1)
    starts, ends = cuts[:, :3].ravel(), cuts[:, 1:].ravel()
    row = np.repeat(np.arange(len(bands)), 3)[starts < ends]
    starts, ends = starts[starts < ends], ends[starts < ends]
    slanted_left, slanted_right = starts >= left_turn[row], starts < right_turn[row]
    k_starts = np.where(slanted_left, starts + lo[row], k0[row])
    k_ends = np.where(slanted_right, ends + hi[row], k1[row])
    types = np.where(slanted_left, INVCAUSAL, FULL) + np.where(slanted_right, CAUSAL, FULL)
    return np.stack([starts, ends], axis=1), np.stack([k_starts, k_ends], axis=1), types


def _turns(bands: Ints) -> tuple[Ints, Ints]:
    """``[n]`` each: the query from which the left end slants, and from which the right end is level."""
    q0, q1, k0, k1, lo, hi = bands.T
    left_turn = np.clip(k0 - lo, q0, q1)
    right_turn = np.clip(k1 - hi, q0, q1)
    # One query alone is level and slanted at once: call it what saves a slice.
    left_turn = np.where(left_turn >= q1 - 1, q1, left_turn)
    right_turn = np.where(right_turn <= q0 + 1, q0, right_turn)
    # For the same reason two turns at most two queries apart can be made one.
    close = (q0 < left_turn) & (left_turn < right_turn) & (right_turn <= left_turn + 2) & (right_turn < q1)
    left_turn, right_turn = (np.where(close, left_turn + 1, turn) for turn in (left_turn, right_turn))
    return left_turn, right_turn


def area(bands: Ints) -> Ints:
    """``[n]`` int64: attended cells of every row, in closed form."""
    q0, q1, k0, k1, lo, hi = bands.T
    num_slanted = np.clip(k1 - hi - 1 - q0, 0, q1 - q0)  # queries whose right end is still left of k1
    right = _sum_range(q0, q0 + num_slanted) + num_slanted * (hi + 1) + (q1 - q0 - num_slanted) * k1
    num_level = np.clip(k0 - lo - q0, 0, q1 - q0)  # queries whose left end is at k0
    left = num_level * k0 + _sum_range(q0 + num_level, q1) + (q1 - q0 - num_level) * lo
    result: Ints = right - left
    return result


def num_cells(bands: Ints) -> int:
    """Attended cells of all rows, those that two rows list counted twice: exact, whatever its size."""
    cells = area(bands)
    is_safe = not len(cells) or int(cells.max()) <= np.iinfo(np.int64).max // len(cells)
    return int(cells.sum()) if is_safe else sum(cells.tolist())


def _sum_range(start: Ints, end: Ints) -> Ints:
    result: Ints = (end - start) * (start + end - 1) // 2
    return result


def expand(first: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Row ``r`` meets the ``count[r]`` things numbered from ``first[r]``: ``(row, thing)``, one entry a meeting."""
    row = np.repeat(np.arange(len(count)), count)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return row, first[row] + offset


def split_q(bands: Ints, starts: Ints, ends: Ints) -> tuple[Ints, Ints, Ints]:
    """Cut rows by disjoint ascending query intervals ``[starts, ends)`` (``[m]`` each), dropping what no interval holds.

    Returns ``(pieces [p, 6], row [p], interval [p])``, ordered by row, then interval.
    """
    return _split(bands, starts, ends, Q0, Q1)


def split_k(bands: Ints, starts: Ints, ends: Ints) -> tuple[Ints, Ints, Ints]:
    """As `split_q`, by key intervals."""
    return _split(bands, starts, ends, K0, K1)


def _split(bands: Ints, starts: Ints, ends: Ints, begin: int, end: int) -> tuple[Ints, Ints, Ints]:
    first = np.searchsorted(ends, bands[:, begin], side="right")
    last = np.searchsorted(starts, bands[:, end], side="left")
    row, interval = expand(first, np.maximum(last - first, 0))
    pieces = bands[row]
    pieces[:, begin] = np.maximum(pieces[:, begin], starts[interval])
    pieces[:, end] = np.minimum(pieces[:, end], ends[interval])
    pieces, kept = tighten(pieces)
    return pieces, row[kept], interval[kept]


def shift(bands: Ints, q_by: Ints | int, k_by: Ints | int) -> Ints:
    """Move rows by ``q_by`` queries and ``k_by`` keys (a number, or one a row)."""
    moved = bands.copy()
    moved[:, Q0:K0] += np.asarray(q_by, np.int64).reshape(-1, 1)
    moved[:, K0:LO] += np.asarray(k_by, np.int64).reshape(-1, 1)
    moved[:, LO:] += (np.asarray(k_by, np.int64) - np.asarray(q_by, np.int64)).reshape(-1, 1)
    return moved


def to_dense(bands: Ints, num_q: int, num_k: int) -> Ints:
    """``[num_q, num_k]`` int64: how many rows list each cell (0 or 1 in a valid mask)."""
    q_index, k_index = np.arange(num_q)[:, None], np.arange(num_k)[None, :]
    count = np.zeros((num_q, num_k), np.int64)
    for q0, q1, k0, k1, lo, hi in bands.tolist():
        diagonal = k_index[:, k0:k1] - q_index[q0:q1]
        count[q0:q1, k0:k1] += (lo <= diagonal) & (diagonal <= hi)
    return count


def find_overlap(bands: Ints) -> tuple[int, int, Ints] | None:
    """Two rows that list a cell both, and the ``[6]`` row of the cells that they share; None where cells are disjoint.

    Sweeps along the axis on which fewer rows meet, and compares the meeting pairs in closed form.
    """
    sweeps = []
    for begin, end in ((Q0, Q1), (K0, K1)):
        order = np.argsort(bands[:, begin], kind="stable")
        last = np.searchsorted(bands[order, begin], bands[order, end], side="left")
        count = np.maximum(last - np.arange(len(bands)) - 1, 0)
        sweeps.append((int(count.sum()), order, count))
    _, order, count = min(sweeps, key=lambda sweep: sweep[0])
    block = np.cumsum(count) // _PAIRS_AT_ONCE
    for at in np.flatnonzero(np.diff(block, prepend=-1)):
        stop = np.searchsorted(block, block[at], side="right")
        left, right = expand(np.arange(at, stop) + 1, count[at:stop])
        a, b = bands[order[left + at]], bands[order[right]]
        shared = np.where(np.arange(6) % 2 == 0, np.maximum(a, b), np.minimum(a, b))
        shared, overlapping = tighten(shared)
        if len(shared):
            pair = int(np.flatnonzero(overlapping)[0])
            return int(order[left[pair] + at]), int(order[right[pair]]), shared[0]
    return None


def check_disjoint(bands: Ints) -> None:
    """ValueError naming two rows, and a cell, where a cell is listed twice."""
    found = find_overlap(bands)
    if found is not None:
        first, second, shared = found
        q, k = int(shared[Q0]), int(max(shared[K0], shared[Q0] + shared[LO]))
        raise ValueError(
            f"the slices of a mask must attend disjoint cells, but cell (query {q}, key {k}) is attended by two of them: "
            f"{describe_band(bands[first])} and {describe_band(bands[second])}. Cut one of the two so that each cell is "
            "listed once"
        )


def describe_band(band: Ints) -> str:
    """One row in words: its ranges and which diagonals of them it attends."""
    q0, q1, k0, k1, lo, hi = (int(value) for value in band)
    bounds = [f"j - i >= {lo}"] * (lo > k0 - q1 + 1) + [f"j - i <= {hi}"] * (hi < k1 - 1 - q0)
    return f"queries [{q0}, {q1}) x keys [{k0}, {k1})" + (" where " + " and ".join(bounds) if bounds else "")
