"""A half-open interval of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RangeError(ValueError):
    """Bounds that are no range, or a range outside what it must lie in."""


class AttnRange:
    """Tokens ``start .. end - 1``. Mutable, as programs already written expect; the planner works on arrays of its own.

    Raises:
        RangeError: unless ``0 <= start <= end``.
    """

    __slots__ = ("_end", "_start")

    def __init__(self, start: int, end: int) -> None:
        _check_bounds(start, end)
        self._start, self._end = int(start), int(end)

    @property
    def start(self) -> int:
        """The first token."""
        return self._start

    @start.setter
    def start(self, start: int) -> None:
        _check_bounds(start, self._end)
        self._start = int(start)

    @property
    def end(self) -> int:
        """One behind the last token."""
        return self._end

    @end.setter
    def end(self, end: int) -> None:
        _check_bounds(self._start, end)
        self._end = int(end)

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
            return attn_range.clone()
        if len(attn_range) != 2:
            raise RangeError(f"a range is a pair (start, end), got {attn_range!r}")
        return cls(*attn_range)

    def to_naive_range(self) -> tuple[int, int]:
        """``(start, end)``."""
        return self._start, self._end

    def clone(self) -> AttnRange:
        """An equal range of its own."""
        return AttnRange(self._start, self._end)

    def offset(self, offset: int) -> AttnRange:
        """A range moved by ``offset`` tokens.

        Raises:
            RangeError: it would start below 0.
        """
        return AttnRange(self._start + offset, self._end + offset)

    def truncate(self, start: int | None = None, end: int | None = None) -> AttnRange:
        """What lies in ``[start, end)``; empty where nothing does."""
        new_start = self._start if start is None else max(self._start, start)
        new_end = self._end if end is None else min(self._end, end)
        return AttnRange(new_start, max(new_start, new_end))

    def intersect(self, other: AttnRange) -> AttnRange:
        """What both hold; empty where they do not meet."""
        start, end = max(self._start, other._start), min(self._end, other._end)
        return AttnRange(min(start, end), end) if start <= end else AttnRange(start, start)

    def intersect_size(self, other: AttnRange) -> int:
        """Tokens that both hold."""
        return max(0, min(self._end, other._end) - max(self._start, other._start))

    def union(self, other: AttnRange) -> list[AttnRange]:
        """What either holds: one range where they touch or overlap, else both in order; empty ones are left out."""
        if self.is_empty() or other.is_empty():
            return [r.clone() for r in (self, other) if not r.is_empty()][:1]
        first, second = sorted((self, other), key=lambda r: r.to_naive_range())
        if second._start <= first._end:
            return [AttnRange(first._start, max(first._end, second._end))]
        return [first.clone(), second.clone()]

    def union_size(self, other: AttnRange) -> int:
        """Tokens that either holds."""
        return self.seqlen + other.seqlen - self.intersect_size(other)

    def diff_by(self, other: AttnRange) -> list[AttnRange]:
        """The parts of ``other`` that are not in self, in order."""
        if not self.is_overlap_with(other):
            return [] if other.is_empty() else [other.clone()]
        parts = [(other._start, self._start), (self._end, other._end)]
        return [AttnRange(start, end) for start, end in parts if start < end]

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
        """Whether ``start`` and ``end`` (left out: this range's own) bound a closed interval: ``start <= end``."""
        return (self._start if start is None else start) <= (self._end if end is None else end)

    def is_valid_open(self, start: int | None = None, end: int | None = None) -> bool:
        """Whether they bound a half-open interval that holds a token: ``start < end``."""
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
        return self.to_naive_range() == other.to_naive_range()

    def __hash__(self) -> int:
        return hash(self.to_naive_range())

    def __repr__(self) -> str:
        return f"[{self._start}, {self._end})"


def _check_bounds(start: Any, end: Any) -> None:
    if not 0 <= start <= end:
        raise RangeError(f"a range must satisfy 0 <= start <= end, got start={start}, end={end}")
