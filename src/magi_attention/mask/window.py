"""Sliding windows, and the keys that all see, as the fewest slices of the four types.

A sample has ``sq`` queries and ``sk`` keys, bottom-right aligned. Where ``sq > sk`` the first ``sq - sk`` queries see nothing; the
others are rows ``0 .. num_q - 1`` here, and keys are columns ``0 .. num_k - 1``. Row ``i`` sees ``lo <= j - i <= hi``, and of the
first ``num_global`` keys those with ``j - i <= hi``:

    global keys      ##......     left end: level, until it turns slanted in the left turn,
        |            ###.....     the last row that begins where the level is
        v            ####....
                     #.###...     right end: slanted, until it turns level in the right turn,
                     #..####.     the first row that ends at the last key
                     #...####
                     #....###

Rows between two turns are one slice, and the row of a turn belongs to either side. With global keys, whichever cut takes fewest:

- *beside*: the global keys are a block of all rows, and the window begins behind them;
- *below*: rows above the left turn keep their global keys, the block begins with the slanted rows;
- *column*: one global key; the window is cut as without it, and the key is added to the rows that lost it;
- *thin*: beside, where the window behind the block has two diagonals or two columns, each of them a slice.

Trying every set of slices shows that no fewer do, for samples of up to 10 tokens, every window and number of global keys
(`tests/test_mask/test_window.py` repeats this).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import BICAUSAL, CAUSAL, FULL, INVCAUSAL, Ints, tighten
from magi_attention.mask.inputs import MOST_TOKENS

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class _Samples:
    """Samples that attend something; every field ``[num_samples]`` int64. See the top of the file."""

    num_q: Ints
    num_k: Ints
    lo: Ints
    hi: Ints
    num_global: Ints

    def select(self, which: Flags | Ints) -> _Samples:
        return _Samples(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True)
class _Cut:
    """How to cut each sample; every field ``[num_samples]`` int64.

    The window is rows ``first_row ..`` whose left end is at column ``level`` above ``left_cut`` and slanted from there on, and whose
    right end is slanted above ``right_cut`` and level from there on. The block of global keys is rows ``block_row ..``.
    """

    first_row: Ints
    level: Ints
    left_cut: Ints
    right_cut: Ints
    block_row: Ints

    def num_slices(self, samples: _Samples) -> Ints:
        left_splits = (self.first_row < self.left_cut) & (self.left_cut < samples.num_q)
        right_splits = (self.first_row < self.right_cut) & (self.right_cut < samples.num_q)
        apart = self.left_cut != self.right_cut
        has_block = (self.block_row < samples.num_q) & (samples.num_global > 0)
        return 1 + left_splits + (right_splits & (apart | ~left_splits)) + has_block.astype(np.int64)


def check_window(window_size: Sequence[int]) -> tuple[int, int]:
    """``window_size`` as a tuple; sides beyond ``MOST_TOKENS``, which bound nothing either, become that.

    Raises:
        ValueError: anything but two ints of -1 or more.
    """
    window = tuple(window_size) if isinstance(window_size, Iterable) else ()
    if len(window) != 2 or not all(isinstance(side, (int, np.integer)) and side >= -1 for side in window):
        raise ValueError(
            "window_size must be two ints (left, right): how many keys a query sees on either side of its own, -1 for all; got "
            f"{window_size!r}"
        )
    return min(int(window[0]), MOST_TOKENS), min(int(window[1]), MOST_TOKENS)


def window_slices(
    q_ranges: Ints, k_ranges: Ints, window_size: tuple[int, int], num_global: int = 0
) -> tuple[Ints, Ints, Ints]:
    """The slices of every sample, ordered by sample.

    Args:
        q_ranges, k_ranges: ``[num_samples, 2]``, the tokens of each sample.
        window_size: ``(left, right)`` as flash-attention's: query ``i`` of a sample sees keys
            ``i + sk - sq - left .. i + sk - sq + right``; -1 is unbounded.
        num_global: the first keys of a sample that its queries also see, as far as ``right`` allows.

    Returns:
        ``(q_ranges [n, 2], k_ranges [n, 2], types [n])`` int64: disjoint slices, none empty, as few as possible.
    """
    samples, origin = _samples(q_ranges, k_ranges, window_size, num_global)
    slices = _fewest_slices(samples)
    at = origin[slices[:, 0]]
    return slices[:, 1:3] + at[:, :1], slices[:, 3:5] + at[:, 1:], slices[:, 5]


def window_bands(q_ranges: Ints, k_ranges: Ints, window_size: tuple[int, int], num_global: int = 0) -> Ints:
    """The same cells as a band table: one row a sample, two with global keys. Arguments as in `window_slices`."""
    samples, origin = _samples(q_ranges, k_ranges, window_size, num_global)
    (q0, k0), diagonal = origin.T, origin[:, 1] - origin[:, 0]
    q1, split, k1 = q0 + samples.num_q, k0 + samples.num_global, k0 + samples.num_k
    lo, hi = samples.lo + diagonal, samples.hi + diagonal
    block = np.stack([q0, q1, k0, split, k0 - q1 + 1, hi], axis=1)
    window = np.stack([q0, q1, split, k1, lo, hi], axis=1)
    return tighten(np.stack([block, window], axis=1).reshape(-1, 6))[0]


def _samples(q_ranges: Ints, k_ranges: Ints, window_size: tuple[int, int], num_global: int) -> tuple[_Samples, Ints]:
    """The samples that attend something, and ``[num_samples, 2]`` the query and key at which their rows and columns begin."""
    all_q, all_k = np.asarray(q_ranges, np.int64).reshape(-1, 2), np.asarray(k_ranges, np.int64).reshape(-1, 2)
    num_k = all_k[:, 1] - all_k[:, 0]
    num_q = np.minimum(all_q[:, 1] - all_q[:, 0], num_k)
    # A side as wide as the keys bounds nothing, as -1 does.
    left, right = (num_k if side < 0 else np.minimum(side, num_k) for side in window_size)
    lo, hi = num_k - num_q - left, num_k - num_q + right
    samples = _Samples(num_q, num_k, lo, hi, np.minimum(num_global, num_k))
    origin = np.stack([all_q[:, 1] - num_q, all_k[:, 0]], axis=1)
    return samples.select(num_q > 0), origin[num_q > 0]


def _fewest_slices(samples: _Samples) -> Ints:
    """``[n, 6]`` rows ``(sample, row, end of rows, column, end of columns, type)``, ordered by sample."""
    # Only rows behind the left turn lose global keys; where there are none, a window without bound on the left is the same.
    has_gap = (samples.num_global > 0) & (samples.num_global - samples.lo < samples.num_q - 1)
    simple = (samples.num_global == 0) | ~has_gap
    plain_turn = np.where(samples.num_global > 0, samples.num_q, -samples.lo)
    none = samples.num_q
    zero = np.zeros_like(none)
    plain = _cut(samples, zero, zero, plain_turn, none)

    level_turn = samples.num_global - samples.lo
    beside = _cut(samples, np.maximum(0, samples.num_global - samples.hi), samples.num_global, level_turn, zero)
    below = _cut(samples, zero, zero, level_turn, None)
    column = _cut(samples, zero, zero, -samples.lo, np.maximum(0, 1 - samples.lo))

    block_is_whole = samples.hi + 1 >= samples.num_global
    diagonals, columns = _diagonals(samples), _columns(samples)
    never = 9
    counts = np.stack(
        [
            np.where(simple, plain.num_slices(samples), never),
            np.where(block_is_whole, beside.num_slices(samples), never),
            below.num_slices(samples),
            np.where(samples.num_global == 1, column.num_slices(samples), never),
            np.where(block_is_whole & (samples.hi - samples.lo == 1), 1 + _num_by_sample(diagonals, samples), never),
            np.where(
                block_is_whole & (samples.num_k - samples.num_global == 2), 1 + _num_by_sample(columns, samples), never
            ),
        ]
    )
    counts[1:, simple] = never
    choice = np.argmin(counts, axis=0) if counts.size else zero
    parts = [_slices_of(samples, cut, choice == at) for at, cut in enumerate((plain, beside, below, column))]
    for at, thin in ((4, diagonals), (5, columns)):
        parts += [thin[choice[thin[:, 0]] == at], _block(samples, zero, choice == at)]
    slices = np.concatenate(parts)
    return slices[np.argsort(slices[:, 0], kind="stable")]


def _cut(samples: _Samples, first_row: Ints, level: Ints, left_turn: Ints, block_row: Ints | None) -> _Cut:
    """Cut rows at the turns, at once where they are neighbours. ``block_row`` None: where the slanted rows begin."""
    right_turn = samples.num_k - 1 - samples.hi
    left_cut, left_is_free = _place(left_turn, left_turn, first_row, samples.num_q)
    right_cut, right_is_free = _place(right_turn, right_turn + 1, first_row, samples.num_q)
    together = left_is_free & right_is_free & (np.abs(left_turn - right_turn) <= 1)
    later = np.maximum(left_turn, right_turn)
    left_cut, right_cut = np.where(together, later, left_cut), np.where(together, later, right_cut)
    return _Cut(first_row, level, left_cut, right_cut, left_cut if block_row is None else block_row)


def _place(turn: Ints, cut: Ints, first_row: Ints, num_q: Ints) -> tuple[Ints, Flags]:
    """The row at which to cut for a turn, and whether it is inside: a turn in the first or last row, or beyond, needs no cut."""
    is_free = (first_row < turn) & (turn < num_q - 1)
    return np.where(is_free, cut, np.where(turn <= first_row, first_row, num_q)), is_free


def _slices_of(samples: _Samples, cut: _Cut, chosen: Flags) -> Ints:
    """The slices of the samples that are cut so, as rows of `_fewest_slices`."""
    num_q, num_k, lo, hi = samples.num_q, samples.num_k, samples.lo, samples.hi
    edges = np.sort(np.stack([cut.first_row, cut.left_cut, cut.right_cut, num_q]), axis=0, kind="stable")
    parts = []
    for start, end in itertools.pairwise(edges):
        slanted_left, slanted_right = start >= cut.left_cut, end <= cut.right_cut
        kind = np.where(slanted_left, INVCAUSAL, FULL) + np.where(slanted_right, CAUSAL, FULL)
        table = np.stack(
            [
                np.arange(len(num_q)),
                start,
                end,
                np.where(slanted_left, start + lo, cut.level),
                np.where(slanted_right, end + hi, num_k),
                np.where(end - start == 1, FULL, kind),
            ],
            axis=1,
        )
        parts.append(table[chosen & (start < end)])
    return np.concatenate([*parts, _block(samples, cut.block_row, chosen)])


def _block(samples: _Samples, block_row: Ints, chosen: Flags) -> Ints:
    """The global keys of rows ``block_row ..``, as rows of `_fewest_slices`."""
    zero = np.zeros_like(block_row)
    table = np.stack(
        [np.arange(len(zero)), block_row, samples.num_q, zero, samples.num_global, np.full_like(zero, FULL)], axis=1
    )
    return table[chosen & (block_row < samples.num_q) & (samples.num_global > 0)]


def _diagonals(samples: _Samples) -> Ints:
    """The two outer diagonals behind the global keys, each one slice, as rows of `_fewest_slices`."""
    parts = []
    for diagonal in (samples.lo, samples.hi):
        start = np.maximum(0, samples.num_global - diagonal)
        end = np.minimum(samples.num_q, samples.num_k - diagonal)
        kind = np.where(end - start == 1, FULL, BICAUSAL)
        table = np.stack([np.arange(len(start)), start, end, start + diagonal, end + diagonal, kind], axis=1)
        parts.append(table[start < end])
    return np.concatenate(parts)


def _columns(samples: _Samples) -> Ints:
    """The last two columns, each one slice, as rows of `_fewest_slices`."""
    parts = []
    for column in (samples.num_k - 2, samples.num_k - 1):
        start = np.maximum(0, column - samples.hi)
        end = np.minimum(samples.num_q, column - samples.lo + 1)
        kind = np.full_like(start, FULL)
        table = np.stack([np.arange(len(start)), start, end, column, column + 1, kind], axis=1)
        parts.append(table[start < end])
    return np.concatenate(parts)


def _num_by_sample(slices: Ints, samples: _Samples) -> Ints:
    return np.bincount(slices[:, 0], minlength=len(samples.num_q)).astype(np.int64)
