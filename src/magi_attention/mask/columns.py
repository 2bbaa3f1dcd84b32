"""Masks told column by column: for every key, the queries that do not see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from magi_attention.mask.bands import Ints, tighten
from magi_attention.mask.builders import make_mask
from magi_attention.mask.cells import chain_runs
from magi_attention.mask.combine import transpose_bands
from magi_attention.mask.inputs import as_bounds, check_length
from magi_attention.mask.simplify import merge_bands

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask


def from_startend_row_indices(indices: Any, num_q: int | None = None, *, causal: bool = False) -> AttnMask:
    """The mask of column-wise row bounds, as FlashMask (arXiv:2410.01359) takes them.

    Args:
        indices: ``[num_k, 1 | 2 | 4]`` ints, leading axes of size 1 are dropped. Key ``j`` is *not* seen by queries

            ======  =======  ==============================================
            causal  columns  hidden queries
            ======  =======  ==============================================
            yes     1        ``[c0, num_q)``
            yes     2        ``[c0, c1)``
            no      2        ``[c0, num_q)`` and ``[0, c1)``
            no      4        ``[c0, c1)`` and ``[c2, c3)``
            ======  =======  ==============================================

        num_q: left out, ``num_k``. Bounds beyond ``[0, num_q]`` are cut; an interval that ends before it begins hides nothing.
        causal: beside these, hide key ``j`` from queries before it (bottom-right aligned where lengths differ).

    Adjacent keys of the same or slanting bounds merge: documents and windows come back as a row or two each.

    Raises:
        ValueError: another shape, among them one that differs between batches or heads.
    """
    array = as_bounds(indices, "indices")
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    columns = (1, 2) if causal else (2, 4)
    if array.ndim != 2 or array.shape[1] not in columns:
        raise ValueError(
            f"indices must be ints of shape [num_k, {columns[0]}] or [num_k, {columns[1]}] with causal={causal}, got shape "
            f"{list(array.shape)}; bounds that differ between batches or heads are one mask for each of them"
        )
    num_k = len(array)
    num_q = num_k if num_q is None else check_length(num_q, "num_q")
    bounds = np.clip(array, 0, num_q)
    # Neighbours of the same bounds are told together.
    first = np.flatnonzero(np.append(True, (np.diff(bounds, axis=0) != 0).any(axis=1))[:num_k])
    group, q0, q1 = _seen_queries(bounds[first], num_q, causal)
    k0, k1 = first[group], np.append(first[1:], num_k)[group]
    last = num_k - num_q if causal else num_k  # diagonal
    alone = k1 - k0 == 1
    begin = np.maximum(q0[alone], k0[alone] - last)
    seen = begin < q1[alone]
    slanting = transpose_bands(chain_runs(k0[alone][seen], begin[seen], q1[alone][seen]))
    q0, q1, k0, k1 = (edge[~alone] for edge in (q0, q1, k0, k1))
    rows = tighten(np.stack([q0, q1, k0, k1, k0 - q1 + 1, np.minimum(last, k1 - 1 - q0)], axis=1))[0]
    return make_mask(merge_bands(np.concatenate([rows, slanting])), num_q, num_k)


def _seen_queries(bounds: Ints, num_q: int, causal: bool) -> tuple[Ints, Ints, Ints]:
    """``(key, begin, end)`` ``[n]``: the queries between those that the bounds hide, ordered by key, then query."""
    nothing, everything = np.zeros(len(bounds), np.int64), np.full(len(bounds), num_q)
    if bounds.shape[1] == 1:
        hidden = [(bounds[:, 0], everything)]
    elif bounds.shape[1] == 2:
        hidden = [(bounds[:, 0], bounds[:, 1])] if causal else [(bounds[:, 0], everything), (nothing, bounds[:, 1])]
    else:
        hidden = [(bounds[:, 0], bounds[:, 1]), (bounds[:, 2], bounds[:, 3])]
    # Between the hidden intervals, in the order in which they lie.
    starts, ends = (np.stack(edges, axis=1) for edges in zip((nothing, nothing), *hidden, strict=True))
    ends = np.maximum(starts, ends)
    order = np.argsort(starts, axis=1, kind="stable")
    starts, ends = np.take_along_axis(starts, order, axis=1), np.take_along_axis(ends, order, axis=1)
    seen_from = np.maximum.accumulate(ends, axis=1)
    seen_until = np.concatenate([starts[:, 1:], everything[:, None]], axis=1)
    key, at = np.nonzero(seen_from < seen_until)
    return key, seen_from[key, at], seen_until[key, at]
