"""A list of half-open token intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.range import AttnRange

if TYPE_CHECKING:
    import torch

Ints = NDArray[np.int64]


class AttnRanges:
    """Ranges in the order in which they were added; they may overlap. Mutable, as programs already written expect.

    *Sorted* is by start. *Merged* is sorted with no two touching or overlapping. *Local* coordinates are positions in the merged ranges
    laid end to end:

        ranges   ..[5, 10)....[15, 20)....[25, 30)..
        local      [0, 5)      [5, 10)    [10, 15)
    """

    def __init__(self) -> None:
        self._ranges: list[AttnRange] = []

    @staticmethod
    def from_ranges(ranges: AttnRanges | Iterable[AttnRange | Sequence[int]], check: bool = False) -> AttnRanges:
        """Ranges of pairs ``(start, end)``, or copies of ranges.

        Raises:
            RangeError: a pair that is no range.
        """
        result = AttnRanges()
        result._ranges = [AttnRange.from_range(one) for one in ranges]
        if check:
            result.check_valid()
        return result

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> AttnRanges:
        """The ranges between cumulative lengths ``[0, n1, n1 + n2, ..., seq_len]``; none of an empty list.

        Raises:
            ValueError: they do not begin at 0, ascend, and end at ``seq_len``.
        """
        ends = list(cu_seqlens)
        ascends = all(a < b for a, b in zip(ends, ends[1:], strict=False))
        if ends and not (ends[0] == 0 and ends[-1] == seq_len and ascends):
            raise ValueError(f"cu_seqlens must begin at 0, ascend strictly and end at seq_len={seq_len}, got {ends}")
        return AttnRanges.from_ranges(list(zip(ends, ends[1:], strict=False)))

    @staticmethod
    def _from_array(pairs: Ints) -> AttnRanges:
        return AttnRanges.from_ranges(pairs.tolist())

    def _to_array(self) -> Ints:
        return np.array(self.to_naive_ranges(), np.int64).reshape(-1, 2)

    def to_naive_ranges(self) -> list[tuple[int, int]]:
        """``[(start, end), ...]``."""
        return [one.to_naive_range() for one in self._ranges]

    def to_cu_seqlens(self, seq_len: int) -> list[int]:
        """``[0, end of the first, ...]``.

        Raises:
            ValueError: unless `is_cu_seqlens`.
        """
        if not self.is_cu_seqlens(seq_len):
            raise ValueError(f"ranges must tile [0, {seq_len}) in order to be cu_seqlens, got {self}")
        return [0, *(one.end for one in self._ranges)]

    def to_tensor(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """``[n, 2]`` int32 on ``device``."""
        import torch

        return torch.tensor(self.to_naive_ranges(), dtype=torch.int32, device=device).reshape(-1, 2)

    def append(self, attn_range: AttnRange, check: bool = False) -> None:
        """Add one at the end."""
        if check:
            attn_range.check_valid()
        self._ranges.append(attn_range)

    def insert(self, idx: int, attn_range: AttnRange, check: bool = False) -> None:
        """Add one before position ``idx``."""
        if check:
            attn_range.check_valid()
        self._ranges.insert(idx, attn_range)

    def extend(self, attn_ranges: AttnRanges, check: bool = False) -> None:
        """Add all of another list at the end."""
        if check:
            attn_ranges.check_valid()
        self._ranges.extend(attn_ranges._ranges)

    def pop(self, idx: int = -1) -> AttnRange:
        """Remove and return one.

        Raises:
            IndexError: there is none at ``idx``.
        """
        return self._ranges.pop(idx)

    def clear_empty(self) -> AttnRanges:
        """A list without empty ranges."""
        return self._of(one for one in self._ranges if not one.is_empty())

    def clone(self) -> AttnRanges:
        """A list of its own, of ranges of its own."""
        return AttnRanges.from_ranges(self)

    def sort(self) -> AttnRanges:
        """A new list, by start; ranges that start together keep their order."""
        return AttnRanges.from_ranges(sorted(self._ranges, key=lambda one: one.start))

    def merge(self) -> AttnRanges:
        """A new list: the union, as merged ranges."""
        return AttnRanges._from_array(_merged(self._to_array()))

    def chunk(self, chunk_size: int, check: bool = True) -> list[AttnRanges]:
        """Cut into lists of ``chunk_size`` tokens each, in order; the last may hold fewer.

        Raises:
            AssertionError: with ``check``, ranges that overlap.
            ValueError: a chunk_size below 1.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        assert not check or self.is_non_overlap(), f"ranges that are chunked must not overlap, got {self}"
        chunks: list[AttnRanges] = []
        room = 0
        for one in self._ranges:
            start = one.start
            while start < one.end:
                if room == 0:
                    chunks.append(AttnRanges())
                    room = chunk_size
                end = min(one.end, start + room)
                chunks[-1].append(AttnRange(start, end))
                room -= end - start
                start = end
        return chunks

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRanges:
        """What of each lies in ``[start, end)``; ranges of which nothing does are left out."""
        return self._of(one.truncate(start, end) for one in self._ranges).clear_empty()

    def is_sorted(self) -> bool:
        """Whether starts do not descend."""
        return all(a.start <= b.start for a, b in self._pairs())

    def is_merged(self) -> bool:
        """Whether sorted, and no two touch or overlap."""
        return self.is_sorted() and all(a.end < b.start for a, b in self._pairs())

    def is_non_overlap(self) -> bool:
        """Whether no token is in two ranges."""
        return self.intersect_size() == 0

    def is_cu_seqlens(self, seqlen: int) -> bool:
        """Whether they tile ``[0, seqlen)`` in order."""
        if self.is_empty():
            return seqlen == 0
        tiles = all(a.end == b.start for a, b in self._pairs())
        return self._ranges[0].start == 0 and tiles and self._ranges[-1].end == seqlen

    def is_valid(self) -> bool:
        """Whether every range's start is at most its end."""
        return all(one.is_valid_close() for one in self._ranges)

    def check_valid(self) -> None:
        """ValueError unless `is_valid`."""
        if not self.is_valid():
            raise ValueError(f"every range must satisfy start <= end, got {self}")

    def is_empty(self) -> bool:
        """Whether the list has no ranges."""
        return not self._ranges

    def find_hole_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """Merged ranges of the tokens in self and not in the other."""
        return self._combine(other_attn_ranges, lambda mine, theirs: mine & ~theirs)

    def find_overlap_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """Merged ranges of the tokens in both."""
        return self._combine(other_attn_ranges, lambda mine, theirs: mine & theirs)

    def _combine(self, other: AttnRanges, rule: _Rule) -> AttnRanges:
        mine, theirs = _merged(self._to_array()), _merged(other._to_array())
        points = np.unique(np.concatenate([mine.ravel(), theirs.ravel()]))
        if len(points) < 2:
            return AttnRanges()
        kept = rule(_holds(mine, points[:-1]), _holds(theirs, points[:-1]))
        return AttnRanges._from_array(_merged(np.stack([points[:-1], points[1:]], axis=1)[kept]))

    def make_range_local(
        self, other_attn_range: AttnRange, is_self_merged: bool = False, prefix_offset: list[int] | None = None
    ) -> tuple[AttnRange, AttnRange]:
        """A global range in local coordinates, and the merged range of self that holds it.

        ``is_self_merged`` and ``prefix_offset`` save nothing here and are kept for callers.

        Raises:
            ValueError: no merged range of self holds all of it.
        """
        merged = _merged(self._to_array())
        start, at = _to_local(merged, np.array([other_attn_range.to_naive_range()]))
        return AttnRange(int(start[0]), int(start[0]) + other_attn_range.seqlen), AttnRange(*merged[at[0]].tolist())

    def make_ranges_local(self, other_attn_ranges: AttnRanges, is_self_merged: bool = False) -> AttnRanges:
        """Global ranges, one by one, in local coordinates. ValueError as `make_range_local`."""
        wanted = other_attn_ranges._to_array()
        start, _ = _to_local(_merged(self._to_array()), wanted)
        return AttnRanges._from_array(np.stack([start, start + wanted[:, 1] - wanted[:, 0]], axis=1))

    def intersect_size(self) -> int:
        """How many tokens are listed again: a token in n ranges counts n - 1 times."""
        pairs = _merged(self._to_array())
        return self.total_seqlen - int((pairs[:, 1] - pairs[:, 0]).sum())

    def intersect_size_with(self, other: AttnRanges) -> int:
        """As `intersect_size` of both lists together, over the tokens that both hold."""
        both = self.find_overlap_ranges(other)
        inside = self._of(one.intersect(shared) for shared in both for one in (*self._ranges, *other._ranges))
        return inside.intersect_size()

    def union_size(self) -> int:
        """Tokens that any range holds, once each."""
        return self.total_seqlen - self.intersect_size()

    def union_size_with(self, other: AttnRanges) -> int:
        """Tokens that any range of either list holds, once each."""
        return self._of([*self._ranges, *other._ranges]).union_size()

    @property
    def total_seqlen(self) -> int:
        """Sum of the lengths, in tokens."""
        return sum(one.seqlen for one in self._ranges)

    @property
    def max_seqlen(self) -> int:
        """Length of the longest, in tokens; 0 of none."""
        return max((one.seqlen for one in self._ranges), default=0)

    @property
    def start(self) -> int:
        """The smallest start. ValueError of none."""
        if self.is_empty():
            raise ValueError("an empty list of ranges has no start")
        return min(one.start for one in self._ranges)

    @property
    def end(self) -> int:
        """The largest end. ValueError of none."""
        if self.is_empty():
            raise ValueError("an empty list of ranges has no end")
        return max(one.end for one in self._ranges)

    @property
    def size(self) -> int:
        """Number of ranges."""
        return len(self._ranges)

    @property
    def points(self) -> list[int]:
        """All starts and ends, ascending, once each."""
        return sorted({point for one in self._ranges for point in one.to_naive_range()})

    def _of(self, ranges: Iterable[AttnRange]) -> AttnRanges:
        result = AttnRanges()
        result._ranges = list(ranges)
        return result

    def _pairs(self) -> Iterable[tuple[AttnRange, AttnRange]]:
        return zip(self._ranges, self._ranges[1:], strict=False)

    def __len__(self) -> int:
        return len(self._ranges)

    @overload
    def __getitem__(self, idx: int) -> AttnRange: ...
    @overload
    def __getitem__(self, idx: slice) -> AttnRanges: ...
    def __getitem__(self, idx: int | slice) -> AttnRange | AttnRanges:
        return self._of(self._ranges[idx]) if isinstance(idx, slice) else self._ranges[idx]

    def __setitem__(self, idx: int | slice, value: AttnRange | AttnRanges) -> None:
        if isinstance(idx, slice):
            assert isinstance(value, AttnRanges), f"a slice takes AttnRanges, got {type(value).__name__}"
            assert idx.stop - idx.start == len(value), f"{idx} takes {idx.stop - idx.start} ranges, got {len(value)}"
            self._ranges[idx] = value._ranges
        else:
            assert isinstance(value, AttnRange), f"an index takes an AttnRange, got {type(value).__name__}"
            self._ranges[idx] = value

    def __iter__(self) -> Iterator[AttnRange]:
        return iter(self._ranges)

    def __eq__(self, other: object) -> bool:
        return self._ranges == other._ranges if isinstance(other, AttnRanges) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._ranges))

    def __repr__(self) -> str:
        return str(self._ranges) if self._ranges else "[[,)]"


def _merged(pairs: Ints) -> Ints:
    """The union of ``[n, 2]`` ranges, merged."""
    if not len(pairs):
        return pairs
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(pairs[:, 1])
    first = np.flatnonzero(np.append(True, pairs[1:, 0] > reach[:-1]))
    last = np.append(first[1:], len(pairs)) - 1
    return np.stack([pairs[first, 0], reach[last]], axis=1)


def _holds(merged: Ints, tokens: Ints) -> NDArray[np.bool_]:
    """Whether merged ranges hold each token."""
    if not len(merged):
        return np.zeros(len(tokens), bool)
    at = np.searchsorted(merged[:, 0], tokens, side="right") - 1
    return (at >= 0) & (tokens < merged[at, 1])


def _to_local(merged: Ints, wanted: Ints) -> tuple[Ints, Ints]:
    """Local starts of ``wanted`` ``[n, 2]``, and which merged range holds each."""
    at = np.searchsorted(merged[:, 0], wanted[:, 0], side="right") - 1
    inside = (at >= 0) & (wanted[:, 1] <= np.append(merged[:, 1], -1)[at])
    if not inside.all():
        lost = AttnRange(*wanted[np.flatnonzero(~inside)[0]].tolist())
        raise ValueError(
            f"The attn_range {lost} is not in the (even merged) attn_ranges {AttnRanges._from_array(merged)}: only a range that lies "
            "inside one of them has local coordinates"
        )
    before = np.cumsum(merged[:, 1] - merged[:, 0]) - (merged[:, 1] - merged[:, 0])
    return before[at] + wanted[:, 0] - merged[at, 0], at


if TYPE_CHECKING:
    from collections.abc import Callable

    _Rule = Callable[[NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]
