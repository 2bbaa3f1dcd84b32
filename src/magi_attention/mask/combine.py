"""Masks made of masks, row by row: no cell is looked at. Each function here is also a method of `AttnMask`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from magi_attention.mask import bands as band_table
from magi_attention.mask.bands import K0, K1, Q0, Q1, Ints, expand, tighten
from magi_attention.mask.builders import make_mask
from magi_attention.mask.inputs import MOST_TOKENS, as_bounds

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask

# Pairs of rows looked at together: bounds the memory, not the result.
_PAIRS_AT_ONCE = 1 << 20


def union(*masks: AttnMask) -> AttnMask:
    """What any of the masks attends.

    Raises:
        ValueError: masks of different lengths, or a cell that two of them attend; the message says which.
    """
    _check_lengths(masks)
    bands = np.concatenate([mask.bands for mask in masks])
    band_table.check_disjoint(bands)
    return make_mask(bands, masks[0].num_q, masks[0].num_k)


def intersection(first: AttnMask, second: AttnMask) -> AttnMask:
    """What both masks attend.

    Raises:
        ValueError: masks of different lengths.
    """
    _check_lengths((first, second))
    return make_mask(intersect_bands(first.bands, second.bands), first.num_q, first.num_k)


def attends_same(first: AttnMask, second: AttnMask) -> bool:
    """Whether both masks attend the same cells, however they are cut. Exact, from the rows' areas."""
    if (first.num_q, first.num_k) != (second.num_q, second.num_k) or first.area != second.area:
        return False
    shared = int(band_table.area(intersect_bands(first.bands, second.bands)).sum())
    return shared == first.area


def restrict(mask: AttnMask, q_ranges: Any = None, k_ranges: Any = None) -> AttnMask:
    """What the mask attends inside some queries and keys; lengths stay.

    Args:
        q_ranges, k_ranges: a pair ``(start, end)`` or disjoint ascending pairs; left out, all.
    """
    bands = mask.bands
    if q_ranges is not None:
        starts, ends = _as_intervals(q_ranges, "q_ranges").T
        bands = band_table.split_q(bands, starts, ends)[0]
    if k_ranges is not None:
        starts, ends = _as_intervals(k_ranges, "k_ranges").T
        bands = band_table.split_k(bands, starts, ends)[0]
    return make_mask(bands, mask.num_q, mask.num_k)


def shift(mask: AttnMask, q_by: int, k_by: int, num_q: int | None = None, num_k: int | None = None) -> AttnMask:
    """The mask moved down by ``q_by`` queries and right by ``k_by`` keys.

    Args:
        num_q, num_k: the new lengths; left out, the old ones moved along (``num_q + q_by``). What leaves them is dropped.

    Raises:
        ValueError: a step that is no int, or longer than any mask.
    """
    q_by, k_by = _as_step(q_by, "q_by"), _as_step(k_by, "k_by")
    num_q = max(mask.num_q + q_by, 0) if num_q is None else num_q
    num_k = max(mask.num_k + k_by, 0) if num_k is None else num_k
    moved = band_table.shift(mask.bands, q_by, k_by)
    moved[:, [Q0, K0]] = np.maximum(moved[:, [Q0, K0]], 0)
    moved[:, [Q1, K1]] = np.minimum(moved[:, [Q1, K1]], [num_q, num_k])
    return make_mask(moved, num_q, num_k)


def concat(*masks: AttnMask) -> AttnMask:
    """The masks packed one behind the other, each attending only itself.

    ##...
    ##...
    ..###
    """
    edges_q = np.cumsum([0, *(mask.num_q for mask in masks)])
    edges_k = np.cumsum([0, *(mask.num_k for mask in masks)])
    bands = [band_table.shift(mask.bands, int(q), int(k)) for mask, q, k in zip(masks, edges_q, edges_k, strict=False)]
    return make_mask(np.concatenate([band_table.empty_bands(), *bands]), int(edges_q[-1]), int(edges_k[-1]))


def transpose(mask: AttnMask) -> AttnMask:
    """Queries and keys exchanged: cell ``(i, j)`` becomes ``(j, i)``."""
    return make_mask(transpose_bands(mask.bands), mask.num_k, mask.num_q)


def transpose_bands(bands: Ints) -> Ints:
    q0, q1, k0, k1, lo, hi = bands.T
    return np.stack([k0, k1, q0, q1, -hi, -lo], axis=1)


def intersect_bands(first: Ints, second: Ints) -> Ints:
    """The cells of every row of one table that a row of the other has too: tight, one row a pair that meets."""
    found = [band_table.empty_bands()]
    order = np.argsort(second[:, Q0], kind="stable")
    second = second[order]
    # Rows of `second` that begin before a row of `first` ends; those that ended before it begins are cut off by the running maximum.
    reach = np.maximum.accumulate(second[:, Q1]) if len(second) else second[:, Q1]
    begin = np.searchsorted(reach, first[:, Q0], side="right")
    count = np.maximum(np.searchsorted(second[:, Q0], first[:, Q1], side="left") - begin, 0)
    block = np.cumsum(count) // _PAIRS_AT_ONCE
    for at in np.flatnonzero(np.diff(block, prepend=-1)):
        stop = np.searchsorted(block, block[at], side="right")
        row, other = expand(begin[at:stop], count[at:stop])
        a, b = first[row + at], second[other]
        found.append(tighten(np.where(np.arange(6) % 2 == 0, np.maximum(a, b), np.minimum(a, b)))[0])
    return np.concatenate(found)


def _as_intervals(ranges: Any, name: str) -> Ints:
    if hasattr(ranges, "to_naive_ranges"):
        ranges = ranges.to_naive_ranges()
    pairs = as_bounds(ranges, name)
    pairs = pairs.reshape(1, -1) if pairs.ndim == 1 and pairs.size else pairs.reshape(-1, 2)
    starts, ends = pairs.T
    if (starts > ends).any() or (ends[:-1] > starts[1:]).any():
        raise ValueError(f"{name} must be a pair (start, end) or disjoint ascending pairs, got {pairs.tolist()[:8]}")
    return pairs[starts < ends]


def _as_step(step: int, name: str) -> int:
    try:
        number = index(step)
    except TypeError:
        number = MOST_TOKENS + 1
    if abs(number) > MOST_TOKENS:
        raise ValueError(f"{name} must be an int of at most {MOST_TOKENS:,} tokens to either side, got {step!r}")
    return number


def _check_lengths(masks: Sequence[AttnMask]) -> None:
    lengths = {(mask.num_q, mask.num_k) for mask in masks}
    if len(lengths) != 1:
        raise ValueError(
            f"masks combined must be of the same lengths (num_q, num_k), got {sorted(lengths)}; `shift` takes new lengths"
        )
