"""Sets of tokens as merged ranges: ``[n, 2]`` int64 arrays of ``(start, end)``, ascending, no two touching or overlapping.

Nothing here loops over ranges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def merged(pairs: Ints) -> Ints:
    """The union of ranges in any order; an empty range stays where no other holds or touches it."""
    if not len(pairs):
        return pairs
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(pairs[:, 1])
    first = np.flatnonzero(np.append(True, pairs[1:, 0] > reach[:-1]))
    last = np.append(first[1:], len(pairs)) - 1
    return np.stack([pairs[first, 0], reach[last]], axis=1)


def tokens_of(pairs: Ints, is_merged: bool) -> Ints:
    """The union of ranges, without empty ones. ``is_merged``: they are merged already."""
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    return pairs if is_merged else merged(pairs)


def holds(mine: Ints, tokens: Ints) -> NDArray[np.bool_]:
    """``[n]``: whether ``mine``, merged, holds each of ``tokens`` ``[n]``."""
    ends = np.append(mine[:, 1], np.iinfo(np.int64).min)
    held: NDArray[np.bool_] = tokens < ends[np.searchsorted(mine[:, 0], tokens, side="right") - 1]
    return held


def cut_by(mine: Ints, theirs: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """``mine`` cut wherever ``theirs`` begins or ends, both merged: ``[n, 2]`` pieces, and ``[n]`` whether ``theirs`` holds each."""
    cuts = theirs.ravel()
    starts = np.unique(np.concatenate([mine[:, 0], cuts[holds(mine, cuts)]]))
    cut_range = np.searchsorted(mine[:, 0], starts, side="right") - 1
    ends = np.minimum(np.append(starts[1:], np.iinfo(np.int64).max), mine[cut_range, 1])
    return np.stack([starts, ends], axis=1), holds(theirs, starts)


def num_tokens(pairs: Ints) -> int:
    """Sum of the lengths."""
    return int((pairs[:, 1] - pairs[:, 0]).sum())


def num_tokens_inside(mine: Ints, pairs: Ints) -> int:
    """How often ``pairs``, any ranges, list tokens of ``mine``, merged."""
    if not len(mine):
        return 0
    before = np.concatenate([[0], np.cumsum(mine[:, 1] - mine[:, 0])])
    at = np.searchsorted(mine[:, 0], pairs, side="right")  # [n, 2]: ranges of mine that begin at or before the bound
    behind = np.maximum(mine[at - 1, 1] - pairs, 0)  # tokens of the last of them that lie behind the bound
    return num_tokens(before[at] - np.where(at > 0, behind, 0))
