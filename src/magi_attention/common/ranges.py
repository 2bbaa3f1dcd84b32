"""A list of half-open token intervals.

Methods that compare ranges work on ``[n, 2]`` int64 arrays made on the spot: ranges are mutable and shared, so nothing is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np

from magi_attention.common import merged_arrays as arrays
from magi_attention.common.merged_arrays import Ints
from magi_attention.common.range import AttnRange, NaiveRange, RangeError

if TYPE_CHECKING:
    import torch

# Of a long list, a message shows this many ranges.
_MOST_SHOWN = 16


class RangesError(RangeError, AssertionError):
    """Ranges that are not what a method needs. An AssertionError too, because programs already written catch that."""


class AttnRanges:
    """Ranges in the order in which they were added; they may overlap, touch, or be empty.

    Mutable, as programs already written expect: adding a range, indexing and slicing share the `AttnRange`; making, cloning, sorting and
    merging copy it. *Sorted* is by start. *Merged* is sorted with no two touching or overlapping. *Local* coordinates are positions
    in the merged ranges laid end to end:

        ranges   ..[5, 10)....[15, 20)....[25, 30)..
        local      [0, 5)      [5, 10)    [10, 15)
    """

    def __init__(self) -> None:
        self._ranges: list[AttnRange] = []

    @staticmethod
    def from_ranges(ranges: AttnRanges | Iterable[AttnRange | Sequence[int]], check: bool = False) -> AttnRanges:
        """Ranges of pairs ``(start, end)``, or copies of ranges. Bounds are always checked; ``check`` is kept for callers.

        Raises:
            RangeError: a pair that is no range.
        """
        return _of([AttnRange.from_range(one) for one in ranges])

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> AttnRanges:
        """The ranges between cumulative lengths ``[0, n1, n1 + n2, ..., seq_len]``; none of an empty list.

        Raises:
            ValueError: they do not begin at 0, ascend, and end at ``seq_len``.
        """
        check_valid_cu_seqlens(cu_seqlens, seq_len)
        cu_seqlens = _as_list(cu_seqlens)
        return _of([AttnRange(start, end) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)])

    def to_naive_ranges(self) -> list[tuple[int, int]]:
        """``[(start, end), ...]``."""
        return [one.to_naive_range() for one in self._ranges]

    def to_cu_seqlens(self, seq_len: int) -> list[int]:
        """``[0, end of the first, ..., seq_len]``.

        Raises:
            RangesError: unless `is_cu_seqlens`.
        """
        if not self.is_cu_seqlens(seq_len):
            raise RangesError(f"ranges must tile [0, {seq_len}) in order to be cu_seqlens, got {_shown(self)}")
        return [0, *(one.end for one in self._ranges)]

    def to_tensor(self, device: str | int | torch.device = "cpu") -> torch.Tensor:
        """``[n, 2]`` int32 on ``device``.

        Raises:
            ValueError: a bound that int32 does not hold.
        """
        import torch

        pairs = self._to_array()
        if len(pairs) and (pairs.min() < np.iinfo(np.int32).min or pairs.max() > np.iinfo(np.int32).max):
            raise ValueError(f"bounds must fit in int32, got ranges between {self.start} and {self.end}")
        return torch.from_numpy(pairs.astype(np.int32)).to(device)

    def _to_array(self) -> Ints:
        return np.array(self.to_naive_ranges(), np.int64).reshape(-1, 2)

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
        """A new list without the empty ranges."""
        return _of([one for one in self._ranges if not one.is_empty()])

    def clone(self) -> AttnRanges:
        """A list of its own, of ranges of its own."""
        return AttnRanges.from_ranges(self)

    def sort(self) -> AttnRanges:
        """A new list, by start; ranges that start together keep their order."""
        return _of(sorted(self.clone()._ranges, key=lambda one: one.start))

    def merge(self) -> AttnRanges:
        """A new list: the union, as merged ranges."""
        return _of_array(arrays.merged(self._to_array()))

    def merge_with_split_alignment(self, split_alignment: int = 1) -> AttnRanges:
        """A new list: the union of the ranges rounded outwards to multiples of ``split_alignment``, as merged ranges.

        Raises:
            ValueError: a split_alignment below 1.
        """
        if split_alignment < 1:
            raise ValueError(f"split_alignment must be at least 1, got {split_alignment}")
        pairs = self._to_array()
        starts, ends = pairs[:, 0] // split_alignment, -(-pairs[:, 1] // split_alignment)
        return _of_array(arrays.merged(np.stack([starts, ends], axis=1) * split_alignment))

    def chunk(self, chunk_size: int, check: bool = True) -> list[AttnRanges]:
        """Cut into lists of ``chunk_size`` tokens each, in order; the last may hold fewer. Empty ranges are left out.

        Raises:
            RangesError: with ``check``, ranges that overlap.
            ValueError: a chunk_size below 1.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if check and not self.is_non_overlap():
            raise RangesError(f"ranges that are cut into chunks must not overlap, got {_shown(self)}; merge them first")
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
        return _of([one.truncate(start, end) for one in self._ranges]).clear_empty()

    def is_sorted(self) -> bool:
        """Whether starts do not descend."""
        return all(a.start <= b.start for a, b in self._neighbours())

    def is_merged(self) -> bool:
        """Whether sorted, and no two touch or overlap."""
        return self.is_sorted() and all(a.end < b.start for a, b in self._neighbours())

    def is_non_overlap(self) -> bool:
        """Whether no token is in two ranges."""
        return self.intersect_size() == 0

    def is_cu_seqlens(self, seqlen: int) -> bool:
        """Whether they tile ``[0, seqlen)`` in order."""
        if self.is_empty():
            return seqlen == 0
        tiles = all(a.end == b.start for a, b in self._neighbours())
        return self._ranges[0].start == 0 and tiles and self._ranges[-1].end == seqlen

    def is_valid(self) -> bool:
        """Whether every range's start is at most its end."""
        return all(one.is_valid_close() for one in self._ranges)

    def check_valid(self) -> None:
        """RangeError unless `is_valid`."""
        for one in self._ranges:
            one.check_valid()

    def is_empty(self) -> bool:
        """Whether the list has no ranges."""
        return not self._ranges

    def find_hole_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """Self minus other: the tokens in self and not in the other, as merged ranges.

        The flags, that a list is merged already, save time and change nothing.
        """
        mine = arrays.tokens_of(self._to_array(), is_self_merged)
        pieces, is_shared = arrays.cut_by(mine, arrays.tokens_of(other_attn_ranges._to_array(), is_other_merged))
        return _of_array(pieces[~is_shared])

    def find_overlap_ranges(
        self, other_attn_ranges: AttnRanges, is_self_merged: bool = False, is_other_merged: bool = False
    ) -> AttnRanges:
        """The tokens in both, as merged ranges. Flags as in `find_hole_ranges`."""
        mine = arrays.tokens_of(self._to_array(), is_self_merged)
        pieces, is_shared = arrays.cut_by(mine, arrays.tokens_of(other_attn_ranges._to_array(), is_other_merged))
        return _of_array(pieces[is_shared])

    def make_range_local(
        self, other_attn_range: AttnRange, is_self_merged: bool = False, prefix_offset: list[int] | None = None
    ) -> tuple[AttnRange, AttnRange]:
        """A global range in local coordinates, and the merged range of self that holds it.

        ``is_self_merged``: self is merged already. ``prefix_offset``: the local starts of the merged ranges. Both save time and
        change nothing.

        Raises:
            ValueError: no merged range of self holds all of it.
        """
        merged = self if is_self_merged else self.merge()
        if prefix_offset is None:
            prefix_offset = [0, *accumulate(one.seqlen for one in merged)][:-1]
        if len(prefix_offset) != len(merged):
            raise RangesError(
                f"prefix_offset must hold one local start for each of the {len(merged)} merged ranges, got {len(prefix_offset)}"
            )
        at = bisect_right(merged._ranges, other_attn_range.start, key=lambda one: one.start) - 1
        if at < 0 or not other_attn_range.is_subrange_of(merged[at]):
            raise _not_inside(other_attn_range, merged)
        start = prefix_offset[at] + other_attn_range.start - merged[at].start
        return AttnRange(start, start + other_attn_range.seqlen), merged[at]

    def make_ranges_local(self, other_attn_ranges: AttnRanges, is_self_merged: bool = False) -> AttnRanges:
        """Global ranges, one by one, in local coordinates. Flag and ValueError as in `make_range_local`."""
        wanted, merged = other_attn_ranges._to_array(), self._to_array()
        if not is_self_merged:
            merged = arrays.merged(merged)
        at = np.searchsorted(merged[:, 0], wanted[:, 0], side="right") - 1
        inside = (at >= 0) & (wanted[:, 1] <= np.append(merged[:, 1], -1)[at])
        if not inside.all():
            raise _not_inside(other_attn_ranges[int(np.flatnonzero(~inside)[0])], _of_array(merged))
        lengths = merged[:, 1] - merged[:, 0]
        shift = (np.cumsum(lengths) - lengths - merged[:, 0])[at]
        return _of_array(wanted + shift[:, None])

    def intersect_size(self) -> int:
        """How many tokens are listed again: a token in n ranges counts n - 1 times."""
        return self.total_seqlen - arrays.num_tokens(arrays.merged(self._to_array()))

    def intersect_size_with(self, other: AttnRanges) -> int:
        """As `intersect_size` of both lists together, over the tokens that both hold."""
        shared = self.find_overlap_ranges(other)._to_array()
        listed = arrays.num_tokens_inside(shared, self._to_array()) + arrays.num_tokens_inside(
            shared, other._to_array()
        )
        return listed - arrays.num_tokens(shared)

    def union_size(self) -> int:
        """Tokens listed, with repetition: `total_seqlen`."""
        return self.total_seqlen

    def union_size_with(self, other: AttnRanges) -> int:
        """Tokens listed by both lists, with repetition."""
        return self.total_seqlen + other.total_seqlen

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

    def _neighbours(self) -> Iterable[tuple[AttnRange, AttnRange]]:
        return zip(self._ranges, self._ranges[1:], strict=False)

    def __len__(self) -> int:
        return len(self._ranges)

    @overload
    def __getitem__(self, idx: int) -> AttnRange: ...
    @overload
    def __getitem__(self, idx: slice) -> AttnRanges: ...
    def __getitem__(self, idx: int | slice) -> AttnRange | AttnRanges:
        return _of(self._ranges[idx]) if isinstance(idx, slice) else self._ranges[idx]

    def __setitem__(self, idx: int | slice, value: AttnRange | AttnRanges) -> None:
        """Replace one, or a slice by as many; a slice ``[a:b]`` that reaches behind the end adds there.

        Raises:
            RangesError: another kind of value, or another number of ranges than the slice names.
        """
        if isinstance(idx, slice):
            if not isinstance(value, AttnRanges):
                raise RangesError(f"a slice of AttnRanges takes AttnRanges, got {value!r}")
            has_bounds = (
                idx.start is not None and idx.stop is not None and idx.step is None and min(idx.start, idx.stop) >= 0
            )
            num_named = idx.stop - idx.start if has_bounds else len(range(*idx.indices(len(self))))
            if num_named != len(value):
                raise RangesError(f"the slice names {num_named} ranges, got {len(value)}")
            self._ranges[idx] = value._ranges
        elif isinstance(value, AttnRange):
            self._ranges[idx] = value
        else:
            raise RangesError(f"an index of AttnRanges takes an AttnRange, got {value!r}")

    def __iter__(self) -> Iterator[AttnRange]:
        return iter(self._ranges)

    def __eq__(self, other: object) -> bool:
        return self._ranges == other._ranges if isinstance(other, AttnRanges) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._ranges))

    def __repr__(self) -> str:
        # Not to be taken for an empty list.
        return str(self._ranges) if self._ranges else "[[,)]"


NaiveRanges: TypeAlias = Sequence[NaiveRange]
RangesType: TypeAlias = AttnRanges | NaiveRanges


def is_valid_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> bool:
    """Whether cumulative lengths begin at 0, ascend strictly and end at ``seq_len``; an empty list does."""
    cu_seqlens = _as_list(cu_seqlens)
    if len(cu_seqlens) == 0:
        return True
    ascends = all(a < b for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False))
    return bool(cu_seqlens[0] == 0 and ascends and cu_seqlens[-1] == seq_len)


def check_valid_cu_seqlens(cu_seqlens: Sequence[int], seq_len: int) -> None:
    """ValueError unless `is_valid_cu_seqlens`."""
    if not is_valid_cu_seqlens(cu_seqlens, seq_len):
        raise ValueError(f"cu_seqlens must begin at 0, ascend strictly and end at seq_len={seq_len}, got {cu_seqlens}")


def _as_list(values: Sequence[int]) -> Sequence[int]:
    """Of an array or a tensor, whose type may not be one that can be compared, Python's own ints."""
    result: Sequence[int] = values.tolist() if hasattr(values, "tolist") else values
    return result


def _of(ranges: list[AttnRange]) -> AttnRanges:
    result = AttnRanges()
    result._ranges = ranges
    return result


def _of_array(pairs: Ints) -> AttnRanges:
    return _of([AttnRange(start, end) for start, end in pairs.tolist()])


def _shown(ranges: AttnRanges) -> str:
    """For a message: all of a short list, the beginning of a long one."""
    if len(ranges) <= _MOST_SHOWN:
        return repr(ranges)
    return f"{ranges[:_MOST_SHOWN]!r} and {len(ranges) - _MOST_SHOWN} more"


def _not_inside(attn_range: AttnRange, merged: AttnRanges) -> ValueError:
    return ValueError(
        f"The attn_range {attn_range} has no local coordinates: it must lie inside one of the merged ranges {_shown(merged)}. "
        "Intersect it with them first"
    )
