"""One range: its bounds, and what it has in common with another, against sets of tokens."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import AttnRange, RangeError
from magi_attention.common import range as range_module

bounds = st.tuples(st.integers(-5, 20), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
ranges = bounds.map(lambda pair: AttnRange(*pair))


def tokens(*parts: AttnRange) -> list[int]:
    return [token for part in parts for token in range(part.start, part.end)]


def test_bounds_and_length() -> None:
    one = AttnRange(start=3, end=10)
    assert (one.start, one.end, one.seqlen, len(one)) == (3, 10, 7, 7)
    assert one.to_naive_range() == (3, 10)
    assert repr(one) == "[3, 10)"
    assert not one.is_empty()
    assert AttnRange(4, 4).is_empty()


def test_values_compare_and_hash() -> None:
    assert AttnRange(3, 10) == AttnRange(3, 10)
    assert AttnRange(3, 10) != AttnRange(3, 9)
    assert AttnRange(3, 10) != (3, 10)
    assert AttnRange(0, 0) != AttnRange(1, 1)
    assert len({AttnRange(3, 10), AttnRange(3, 10), AttnRange(3, 11)}) == 2


def test_copies_are_apart() -> None:
    one = AttnRange(3, 10)
    for other in (one.clone(), AttnRange.from_range(one), copy.copy(one), pickle.loads(pickle.dumps(one))):
        assert other == one
        other.start = 4
        assert one.start == 3


@pytest.mark.parametrize("pair", [(3, 10), [3, 10], np.array([3, 10])])
def test_from_range(pair: tuple[int, int]) -> None:
    one = AttnRange.from_range(pair, check=True)
    assert one.to_naive_range() == (3, 10)
    assert type(one.start) is int


@pytest.mark.parametrize("pair", [(1,), (1, 2, 3), ()])
def test_from_range_of_no_pair(pair: tuple[int, ...]) -> None:
    with pytest.raises(RangeError, match="must be a pair"):
        AttnRange.from_range(pair)


def test_invalid_bounds() -> None:
    assert issubclass(RangeError, ValueError)
    assert range_module.RangeError is RangeError
    for make in (
        lambda: AttnRange(5, 3),
        lambda: AttnRange.from_range((5, 3)),
        lambda: AttnRange.from_range([5, 3], check=True),
    ):
        with pytest.raises(RangeError, match="start <= end, got start=5, end=3"):
            make()
    for bad in (1.5, "1", None):
        with pytest.raises(RangeError, match="two ints"):
            AttnRange(bad, 3)  # type: ignore[arg-type]


def test_bounds_can_be_assigned_one_after_the_other() -> None:
    one = AttnRange(0, 5)
    one.start = 10
    assert not one.is_valid_close()
    with pytest.raises(RangeError, match="start=10, end=5"):
        one.check_valid()
    with pytest.raises(RangeError):
        one.clone()
    one.end = 20
    one.check_valid()
    assert one == AttnRange(10, 20)
    with pytest.raises(AttributeError):
        one.seqlen = 3  # type: ignore[misc]


def test_validity_of_given_bounds() -> None:
    one = AttnRange(5, 10)
    assert one.is_valid_close()
    assert one.is_valid_close(7, 7)
    assert one.is_valid_close(end=5)
    assert not one.is_valid_close(8, 6)
    assert one.is_valid_open(3, 8)
    assert not one.is_valid_open(7, 7)
    assert not one.is_valid_open(end=5)
    assert not one.is_valid_open(start=11)
    one.check_valid(7, 7)
    with pytest.raises(RangeError, match="start=11, end=10"):
        one.check_valid(start=11)


def test_offset_goes_either_way() -> None:
    assert AttnRange(3, 8).offset(5) == AttnRange(8, 13)
    assert AttnRange(3, 8).offset(offset=-4) == AttnRange(-1, 4)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (9, 15)),
        (0, 20, (9, 15)),
        (11, None, (11, 15)),
        (None, 13, (9, 13)),
        (11, 13, (11, 13)),
        (1, 7, (9, 9)),
        (17, 23, (17, 17)),
    ],
)
def test_truncate(start: int | None, end: int | None, expected: tuple[int, int]) -> None:
    assert AttnRange(9, 15).truncate(start=start, end=end).to_naive_range() == expected


def test_union_of_ranges_that_touch_or_are_apart_is_both() -> None:
    low, high = AttnRange(0, 3), AttnRange(3, 5)
    assert low.union(high) == [low, high]
    assert high.union(low) == [high, low]
    assert AttnRange(0, 4).union(high) == [AttnRange(0, 5)]
    assert AttnRange(0, 9).union(high) == [AttnRange(0, 9)]
    assert low.union(AttnRange(7, 7)) == [low, AttnRange(7, 7)]


def test_intersection_of_ranges_apart_is_empty_at_the_smaller_end() -> None:
    assert AttnRange(2, 9).intersect(AttnRange(10, 13)) == AttnRange(9, 9)


@given(ranges, ranges)
def test_against_sets(one: AttnRange, other: AttnRange) -> None:
    mine, theirs = set(tokens(one)), set(tokens(other))
    assert set(tokens(one.intersect(other))) == mine & theirs
    assert one.intersect_size(other) == len(mine & theirs)
    assert set(tokens(*one.union(other))) == mine | theirs
    assert one.union_size(other) == len(mine | theirs)
    assert sorted(theirs - mine) == tokens(*one.diff_by(other))
    assert not any(part.is_empty() for part in one.diff_by(other))
    assert one.is_overlap_with(other) == bool(mine & theirs)
    if mine:
        assert one.is_subrange_of(other) == (mine <= theirs)


def test_diff_by_is_what_the_other_has_more() -> None:
    assert AttnRange(4, 7).diff_by(AttnRange(2, 9)) == [AttnRange(2, 4), AttnRange(7, 9)]
    assert AttnRange(2, 9).diff_by(AttnRange(4, 7)) == []
    assert AttnRange(2, 9).diff_by(AttnRange(8, 12)) == [AttnRange(9, 12)]
    assert AttnRange(8, 12).diff_by(AttnRange(2, 9)) == [AttnRange(2, 8)]
    assert AttnRange(2, 9).diff_by(AttnRange(0, 2)) == [AttnRange(0, 2)]
