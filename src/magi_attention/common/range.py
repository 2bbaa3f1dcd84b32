"""A half-open interval of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TypeAlias

# The largest bound of a range on either side of 0, in tokens: sums over millions of ranges stay within int64.
MOST_TOKENS_OF_RANGE = 1 << 40


class RangeError(ValueError):
    """Bounds that are no range."""


class AttnRange:
    """Tokens ``start .. end - 1``.

    Mutable, as programs already written expect: ``start`` and ``end`` may be assigned one after the other, so only making a range checks
    that ``start <= end``; `check_valid` checks it again. Whether a range lies inside a sequence is for the mask to check.

    Raises:
        RangeError: bounds that are not ints or lie beyond 2^40 on either side of 0, or ``start > end``.
    """

    __slots__ = ("_end", "_start")

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = _as_bound(start, "start"), _as_bound(end, "end")
        if self._start > self._end:
            raise RangeError(f"a range must satisfy start <= end, got start={start}, end={end}")

    @property
    def start(self) -> int:
        """The first token."""
        return self._start

    @start.setter
    def start(self, start: int) -> None:
        self._start = _as_bound(start, "start")

    @property
    def end(self) -> int:
        """One behind the last token."""
        return self._end

    @end.setter
    def end(self, end: int) -> None:
        self._end = _as_bound(end, "end")

    @property
    def seqlen(self) -> int:
        """Number of tokens."""
        return self._end - self._start

    @classmethod
    def from_range(cls, attn_range: AttnRange | Sequence[int], check: bool = False) -> AttnRange:
        """A range of a pair ``[start, end]``, or a copy of a range. Bounds are always checked; ``check`` is kept for callers.

        Raises:
            RangeError: no valid pair.
        """
        if isinstance(attn_range, AttnRange):
            return cls(attn_range._start, attn_range._end)
        if len(attn_range) != 2:
            raise RangeError(f"a range must be a pair (start, end), got {attn_range!r}")
        return cls(attn_range[0], attn_range[1])

    def to_naive_range(self) -> tuple[int, int]:
        """``(start, end)``."""
        return self._start, self._end

    def clone(self) -> AttnRange:
        """An equal range of its own."""
        return AttnRange(self._start, self._end)

    def offset(self, offset: int) -> AttnRange:
        """A range moved by ``offset`` tokens."""
        return AttnRange(self._start + offset, self._end + offset)

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRange:
        """What lies in ``[start, end)``, a bound left out being none; empty where nothing does."""
        new_start = self._start if start is None else max(self._start, min(start, MOST_TOKENS_OF_RANGE))
        new_end = self._end if end is None else min(self._end, end)
        return AttnRange(new_start, max(new_start, new_end))

    def intersect(self, other: AttnRange) -> AttnRange:
        """What both hold; empty, at the smaller end, where they do not meet."""
        start, end = max(self._start, other._start), min(self._end, other._end)
        return AttnRange(min(start, end), end)

    def intersect_size(self, other: AttnRange) -> int:
        """Tokens that both hold."""
        return max(0, min(self._end, other._end) - max(self._start, other._start))

    def union(self, other: AttnRange) -> list[AttnRange]:
        """What either holds: one range where they overlap or one holds the other, else ``[self, other]``, also where they only touch."""
        if self.is_empty() or other.is_empty():
            return [self, other]
        if self.is_subrange_of(other):
            return [other]
        if other.is_subrange_of(self):
            return [self]
        if self.is_overlap_with(other):
            return [AttnRange(min(self._start, other._start), max(self._end, other._end))]
        return [self, other]

    def union_size(self, other: AttnRange) -> int:
        """Tokens that either holds."""
        return self.seqlen + other.seqlen - self.intersect_size(other)

    def diff_by(self, other: AttnRange) -> list[AttnRange]:
        """The parts of ``other`` that are not in self, in order; none of them empty."""
        before = (other._start, min(other._end, self._start))
        behind = (max(other._start, self._end), other._end)
        return [AttnRange(start, end) for start, end in (before, behind) if start < end]

    def is_subrange_of(self, other: AttnRange) -> bool:
        """Whether ``other`` holds all of self."""
        return other._start <= self._start and self._end <= other._end

    def is_overlap_with(self, other: AttnRange) -> bool:
        """Whether both hold a token."""
        return self.intersect_size(other) > 0

    def is_empty(self) -> bool:
        """Whether it holds no token."""
        return self._start == self._end

    def is_valid_close(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether ``start <= end``, a closed interval; a bound left out is this range's own."""
        return (self._start if start is None else start) <= (self._end if end is None else end)

    def is_valid_open(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether ``start < end``, a half-open interval that holds a token; a bound left out is this range's own."""
        return (self._start if start is None else start) < (self._end if end is None else end)

    def check_valid(self, start: int | None = None, end: int | None = None) -> None:
        """RangeError unless `is_valid_close`."""
        if not self.is_valid_close(start, end):
            start, end = self._start if start is None else start, self._end if end is None else end
            raise RangeError(f"a range must satisfy start <= end, got start={start}, end={end}")

    def __len__(self) -> int:
        return self.seqlen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttnRange):
            return NotImplemented
        return self._start == other._start and self._end == other._end

    def __hash__(self) -> int:
        return hash((self._start, self._end))

    def __repr__(self) -> str:
        return f"[{self._start}, {self._end})"


def _as_bound(bound: int, name: str) -> int:
    try:
        number = index(bound)
    except TypeError:
        raise RangeError(f"a range must have two ints as bounds, got {name}={bound!r}") from None
    if isinstance(bound, bool) or not -MOST_TOKENS_OF_RANGE <= number <= MOST_TOKENS_OF_RANGE:
        raise RangeError(
            f"the bounds of a range must be ints of at most 2^40 ({MOST_TOKENS_OF_RANGE:,}) on either side of 0, got {name}={bound!r}"
        )
    return number


NaiveRange: TypeAlias = tuple[int, int] | list[int]
RangeType: TypeAlias = AttnRange | NaiveRange
