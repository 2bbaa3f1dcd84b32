"""From cells to rows: a boolean matrix taken apart into few rectangles and bands.

*Runs* are what is attended without a gap along one line of the matrix. Every cell lies in three runs, one of its query, one of its
key and one of its diagonal, and each of the three ways of taking the matrix into runs is a table to start from:

    ##.#     by query: (0, 0-1) (0, 3) (1, 0-2) (2, 2-3)     four runs
    ###.     by key: (0-1, 0) (0-1, 1) (1-2, 2) (0, 3) (2, 3)     five
    ..##     by diagonal: six
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints, slices_from_bands
from magi_attention.mask.builders import make_mask
from magi_attention.mask.combine import transpose_bands
from magi_attention.mask.inputs import as_array
from magi_attention.mask.simplify import merge_bands

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask

Cells = NDArray[np.bool_]

# Larger matrices are taken apart by query only, for the other two ways walk through memory with wide steps.
_MOST_CELLS_FOR_THREE_WAYS = 1 << 22


def from_dense(dense: Any) -> AttnMask:
    """The mask of a boolean matrix: exactly its cells.

    Args:
        dense: ``[num_q, num_k]`` bool (or 0 and 1), array or tensor; leading axes of size 1 are dropped.

    The matrix is taken into runs in three ways (by query, by key, by diagonal; above four million cells by query only), each table of
    runs is simplified, and the one of fewest slices is taken. Guaranteed: a mask that is one row (any rectangle cut by two diagonals)
    comes back as one row; and neither rows nor slices (`to_slices`) are ever more than `equal_runs` has, which merges equal runs of
    adjacent queries. Finding the fewest is hard in general, and not promised.

    Raises:
        ValueError: not a matrix of booleans.
    """
    array = as_array(dense, "dense")
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or (array.dtype != bool and not np.isin(array, (0, 1)).all()):
        raise ValueError(
            "dense must be [num_q, num_k] of booleans, True where attended, got shape "
            f"{list(array.shape)} of {array.dtype}; of what is added to logits, give `dense == 0`; a mask that differs between batches "
            "or heads is one mask for each of them"
        )
    cells = array.astype(bool, copy=False)
    return make_mask(bands_of_cells(cells), *cells.shape)


def bands_of_cells(cells: Cells) -> Ints:
    """``[n, 6]`` tight rows of a boolean matrix; see `from_dense`."""
    by_query = equal_runs(cells)
    merged = merge_bands(by_query)
    if len(merged) <= 1 or cells.size > _MOST_CELLS_FOR_THREE_WAYS:
        return _checked(merged, by_query)
    by_key = transpose_bands(equal_runs(np.ascontiguousarray(cells.T)))
    candidates = [_checked(merged, by_query), merge_bands(by_key), merge_bands(diagonal_runs(cells))]
    candidates = [bands for bands in candidates if len(bands) <= len(by_query)]
    return min(candidates, key=lambda bands: (len(slices_from_bands(bands)[2]), len(bands)))


def _checked(merged: Ints, rectangles: Ints) -> Ints:
    """The merged rows, unless as slices they are more than the rectangles that they were merged of."""
    return merged if len(slices_from_bands(merged)[2]) <= len(rectangles) else rectangles


def equal_runs(cells: Cells) -> Ints:
    """``[n, 6]``: runs of queries as rows, equal runs of adjacent queries merged: what is easily done, and the bound that is kept."""
    query, begin, end = runs_by_line(cells)
    return stack_runs(query, begin, end)


def stack_runs(query: Ints, begin: Ints, end: Ints) -> Ints:
    """``[n, 6]`` rectangles of runs ``(query, [begin, end))``, equal runs of adjacent queries merged."""
    order = np.lexsort((query, end, begin))
    query, begin, end = query[order], begin[order], end[order]
    opens = np.ones(len(query), bool)
    opens[1:] = (np.diff(begin) != 0) | (np.diff(end) != 0) | (np.diff(query) != 1)
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(query))[: len(first)] - 1
    q0, q1, k0, k1 = query[first], query[last] + 1, begin[first], end[first]
    return np.stack([q0, q1, k0, k1, k0 - q1 + 1, k1 - 1 - q0], axis=1)


def chain_runs(line: Ints, begin: Ints, end: Ints) -> Ints:
    """``[n, 6]`` rows of runs ``(line, [begin, end))`` that are ordered by line, then begin: in time that grows as their number.

    Lines that follow each other and have equally many runs continue one another's, the first the first. A row goes on while both of
    its ends stay or both steps are as before, by none or one; `merge_bands` finds what is left to merge.
    """
    if not len(line):
        return np.empty((0, 6), np.int64)
    opens = np.append(True, np.diff(line) != 0)
    first = np.flatnonzero(opens)  # of each line
    count = np.diff(np.append(first, len(line)))
    # Blocks of lines that follow each other with equally many runs, and in them run by run where it was line by line.
    block = np.cumsum(np.append(True, (np.diff(line[first]) != 1) | (np.diff(count) != 0)))
    of_line = np.cumsum(opens) - 1
    block = block[of_line]
    if count.max() > 1:
        order = np.lexsort((np.arange(len(line)) - first[of_line], block))
        line, begin, end, block = line[order], begin[order], end[order], block[order]
    down, left, right = np.diff(line), np.diff(begin), np.diff(end)
    follows = (np.diff(block) == 0) & (down == 1) & (left >> 1 == 0) & (right >> 1 == 0)
    step = np.where(follows, 2 * left + right, -1)
    goes_on = follows & np.append(True, (step[1:] == step[:-1]) | ~follows[:-1])
    start = np.flatnonzero(np.append(True, ~goes_on))
    stop = np.append(start[1:], len(line)) - 1
    q0, q1, k0, k1 = line[start], line[stop] + 1, begin[start], end[stop]
    lo = np.where(begin[stop] > k0, k0 - q0, k0 - q1 + 1)
    hi = np.where(end[start] < k1, end[start] - 1 - q0, k1 - 1 - q0)
    return np.stack([q0, q1, k0, k1, lo, hi], axis=1)


def runs_by_line(cells: Cells) -> tuple[Ints, Ints, Ints]:
    """``(line, begin, end)`` of every run of True along the lines of ``cells``, ``[n]`` each, ordered by line, then begin."""
    padded = np.zeros((cells.shape[0], cells.shape[1] + 1), bool)
    padded[:, :-1] = cells
    flat = padded.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.view(np.int8), prepend=np.int8(0)))
    begin, end = edges[::2], edges[1::2]
    line = begin // padded.shape[1]
    return line, begin - line * padded.shape[1], end - line * padded.shape[1]


def diagonal_runs(cells: Cells) -> Ints:
    """``[n, 6]``: runs of diagonals as rows, each one diagonal wide."""
    num_q, num_k = cells.shape
    # Line d of the sheared matrix holds cells (i, i + d - (num_q - 1)), with i along it.
    sheared = np.zeros((num_q + num_k - 1 if cells.size else 0, num_q), bool)
    query, key = np.nonzero(cells)
    sheared[key - query + num_q - 1, query] = True
    line, begin, end = runs_by_line(sheared)
    diagonal = line - (num_q - 1)
    return np.stack([begin, end, begin + diagonal, end + diagonal, diagonal, diagonal], axis=1)
