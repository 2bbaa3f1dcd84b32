"""A list of ranges: a list's habits, and what its tokens have in common with another's, against sets and counts of tokens."""

from __future__ import annotations

import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.common import AttnRange, AttnRanges, RangeError
from magi_attention.common import ranges as ranges_module

Pairs = list[tuple[int, int]]

some_pairs = st.lists(
    st.tuples(st.integers(-3, 30), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=8
)


def make(*pairs: tuple[int, int]) -> AttnRanges:
    return AttnRanges.from_ranges(pairs)


def tokens(ranges: AttnRanges) -> list[int]:
    return [token for one in ranges for token in range(one.start, one.end)]


def merged_pairs(held: set[int]) -> Pairs:
    """The runs of a set of tokens."""
    starts = sorted(token for token in held if token - 1 not in held)
    ends = sorted(token + 1 for token in held if token + 1 not in held)
    return list(zip(starts, ends, strict=True))


class TestList:
    def test_empty(self) -> None:
        none = AttnRanges()
        assert none.is_empty()
        assert len(none) == none.size == none.total_seqlen == none.max_seqlen == 0
        assert none.points == []
        assert none.to_naive_ranges() == []
        assert repr(none) == "[[,)]"
        for holds in (none.is_valid, none.is_sorted, none.is_merged, none.is_non_overlap):
            assert holds()
        for bound in ("start", "end"):
            with pytest.raises(ValueError, match=f"has no {bound}"):
                getattr(none, bound)
        with pytest.raises(IndexError):
            none.pop()

    @pytest.mark.parametrize(
        "source",
        [
            [(0, 10), (20, 30)],
            [[0, 10], [20, 30]],
            [AttnRange(0, 10), AttnRange(20, 30)],
            np.array([[0, 10], [20, 30]]),
        ],
    )
    def test_from_ranges(self, source: list[tuple[int, int]]) -> None:
        made = AttnRanges.from_ranges(source, check=True)
        assert made.to_naive_ranges() == [(0, 10), (20, 30)]
        assert repr(made) == "[[0, 10), [20, 30)]"
        again = AttnRanges.from_ranges(made)
        assert again == made
        again[0].start = 5
        assert made[0].start == 0

    def test_from_ranges_of_no_range(self) -> None:
        with pytest.raises(RangeError, match="got start=5, end=3"):
            AttnRanges.from_ranges([(0, 1), (5, 3)])

    def test_adding_shares_the_range(self) -> None:
        ranges, one = AttnRanges(), AttnRange(0, 5)
        ranges.append(one)
        ranges.insert(0, AttnRange(7, 9), check=True)
        ranges.extend(make((10, 11), (12, 13)), check=True)
        assert ranges.to_naive_ranges() == [(7, 9), (0, 5), (10, 11), (12, 13)]
        one.end = 6
        assert ranges[1].end == 6
        assert ranges.pop() == AttnRange(12, 13)
        assert ranges.pop(0) == AttnRange(7, 9)
        assert ranges.pop(idx=0) is one
        with pytest.raises(IndexError):
            ranges.pop(5)

    def test_checked_adding_refuses_an_invalid_range(self) -> None:
        bad = AttnRange(0, 5)
        bad.start = 9
        ranges = AttnRanges()
        with pytest.raises(RangeError):
            ranges.append(bad, check=True)
        with pytest.raises(RangeError):
            ranges.insert(0, bad, check=True)
        assert ranges.is_empty()
        ranges.append(bad)
        assert not ranges.is_valid()
        with pytest.raises(RangeError, match="start=9, end=5"):
            ranges.check_valid()
        with pytest.raises(RangeError):
            AttnRanges().extend(ranges, check=True)

    def test_index_slice_iterate(self) -> None:
        ranges = make((0, 10), (20, 30), (40, 50))
        assert ranges[0] == AttnRange(0, 10)
        assert ranges[-1] == AttnRange(40, 50)
        assert isinstance(ranges[1:], AttnRanges)
        assert ranges[1:] == make((20, 30), (40, 50))
        assert ranges[::-2] == make((40, 50), (0, 10))
        assert ranges[1:][0] is ranges[1]
        assert [one.seqlen for one in ranges] == [10, 10, 10]
        with pytest.raises(IndexError):
            ranges[3]

    def test_assignment(self) -> None:
        ranges = make((0, 10), (20, 30))
        ranges[0] = AttnRange(5, 15)
        ranges[1:3] = make((25, 35), (45, 55))
        assert ranges == make((5, 15), (25, 35), (45, 55))
        ranges[-2:] = make((1, 2), (3, 4))
        ranges[:1] = make((0, 1))
        assert ranges == make((0, 1), (1, 2), (3, 4))

    @pytest.mark.parametrize("error", [ValueError, AssertionError])
    def test_assignment_of_what_does_not_fit(self, error: type[Exception]) -> None:
        ranges = make((0, 10), (20, 30))
        with pytest.raises(error, match="names 2 ranges, got 1"):
            ranges[0:2] = make((0, 1))
        with pytest.raises(error, match="takes AttnRanges"):
            ranges[0:2] = AttnRange(0, 1)
        with pytest.raises(error, match="takes an AttnRange"):
            ranges[0] = make((0, 1))
        assert ranges == make((0, 10), (20, 30))

    def test_values_compare_and_hash(self) -> None:
        assert make((0, 10), (20, 30)) == make((0, 10), (20, 30))
        assert make((0, 10), (20, 30)) != make((20, 30), (0, 10))
        assert make((0, 10)) != [(0, 10)]
        assert hash(make((0, 10))) == hash(make((0, 10)))
        assert pickle.loads(pickle.dumps(make((0, 10)))) == make((0, 10))

    def test_clone_and_clear_empty(self) -> None:
        ranges = make((3, 3), (0, 10), (12, 12))
        copied, cleared = ranges.clone(), ranges.clear_empty()
        copied[1].end = 11
        assert ranges == make((3, 3), (0, 10), (12, 12))
        assert cleared == make((0, 10))

    def test_numbers(self) -> None:
        ranges = make((20, 30), (5, 10), (10, 12))
        assert (ranges.size, ranges.total_seqlen, ranges.max_seqlen) == (3, 17, 10)
        assert (ranges.start, ranges.end) == (5, 30)
        assert ranges.points == [5, 10, 12, 20, 30]
        assert ranges.union_size() == 17
        assert ranges.union_size_with(make((0, 3))) == 20

    def test_to_tensor(self) -> None:
        tensor = make((0, 10), (20, 30)).to_tensor()
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == [[0, 10], [20, 30]]
        assert AttnRanges().to_tensor(device="cpu").shape == (0, 2)
        assert make((0, 2**31 - 1)).to_tensor().tolist() == [[0, 2**31 - 1]]
        with pytest.raises(ValueError, match="fit in int32"):
            make((0, 2**31)).to_tensor()


class TestCuSeqlens:
    @pytest.mark.parametrize("ends", [[0], [0, 89], [0, 23, 49, 58, 89]])
    def test_there_and_back(self, ends: list[int]) -> None:
        for source in (ends, np.array(ends), torch.tensor(ends)):
            ranges = AttnRanges.from_cu_seqlens(source, ends[-1])  # type: ignore[arg-type]
            assert ranges.to_naive_ranges() == list(zip(ends, ends[1:], strict=False))
            assert ranges.to_cu_seqlens(ends[-1]) == ends
            assert ranges.is_cu_seqlens(ends[-1])

    def test_of_an_empty_list(self) -> None:
        assert AttnRanges.from_cu_seqlens([], 5) == AttnRanges()
        assert AttnRanges().is_cu_seqlens(0)
        assert not AttnRanges().is_cu_seqlens(5)

    @pytest.mark.parametrize(
        ("ends", "seq_len"), [([23, 49], 49), ([0, 50, 49], 49), ([0, 49, 49], 49), ([0, 23, 89], 90)]
    )
    def test_what_is_none(self, ends: list[int], seq_len: int) -> None:
        with pytest.raises(ValueError, match=f"end at seq_len={seq_len}, got"):
            AttnRanges.from_cu_seqlens(ends, seq_len)
        assert not ranges_module.is_valid_cu_seqlens(ends, seq_len)

    @pytest.mark.parametrize("pairs", [[(1, 5)], [(0, 4)], [(0, 2), (3, 5)], [(2, 5), (0, 2)]])
    def test_ranges_that_do_not_tile(self, pairs: Pairs) -> None:
        assert not make(*pairs).is_cu_seqlens(5)
        for error in (ValueError, AssertionError):
            with pytest.raises(error, match=r"must tile \[0, 5\)"):
                make(*pairs).to_cu_seqlens(5)


class TestOrder:
    def test_sort_keeps_the_order_of_equal_starts(self) -> None:
        ranges = make((30, 35), (0, 10), (0, 5), (10, 25))
        assert ranges.sort() == make((0, 10), (0, 5), (10, 25), (30, 35))
        assert ranges[0] == AttnRange(30, 35)
        assert not ranges.is_sorted()
        assert ranges.sort().is_sorted()

    def test_merge_joins_what_touches(self) -> None:
        ranges = make((20, 30), (0, 10), (10, 20), (40, 50), (42, 44))
        merged = ranges.merge()
        assert merged == make((0, 30), (40, 50))
        merged[0].end = 31
        assert ranges[0] == AttnRange(20, 30)
        assert not make((0, 10), (10, 20)).is_merged()
        assert make((0, 10), (11, 20)).is_merged()
        assert make((5, 5), (7, 9)).merge() == make((5, 5), (7, 9))

    @given(some_pairs)
    def test_against_sets(self, pairs: Pairs) -> None:
        ranges = make(*pairs)
        held, counts = set(tokens(ranges)), Counter(tokens(ranges))
        assert ranges.merge().clear_empty().to_naive_ranges() == merged_pairs(held)
        assert ranges.merge().is_merged()
        assert ranges.is_non_overlap() == (max(counts.values(), default=0) <= 1)
        assert ranges.intersect_size() == sum(counts.values()) - len(held)
        assert ranges.to_naive_ranges() == pairs

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (None, None, [(9, 15), (20, 30), (30, 35), (40, 50)]),
            (25, None, [(25, 30), (30, 35), (40, 50)]),
            (None, 31, [(9, 15), (20, 30), (30, 31)]),
            (25, 31, [(25, 30), (30, 31)]),
            (36, 39, []),
            (0, 5, []),
            (53, 64, []),
        ],
    )
    def test_truncate(self, start: int | None, end: int | None, expected: Pairs) -> None:
        ranges = make((9, 15), (20, 30), (30, 35), (40, 50))
        assert ranges.truncate(start=start, end=end).to_naive_ranges() == expected


class TestChunk:
    def test_ranges_are_cut_where_a_chunk_is_full(self) -> None:
        ranges = make((1, 2), (4, 12), (13, 15), (16, 19))
        assert ranges.chunk(16) == [ranges]
        assert ranges.chunk(chunk_size=4) == [
            make((1, 2), (4, 7)),
            make((7, 11)),
            make((11, 12), (13, 15), (16, 17)),
            make((17, 19)),
        ]

    @given(some_pairs, st.integers(1, 9))
    def test_against_tokens(self, pairs: Pairs, chunk_size: int) -> None:
        chunks = make(*pairs).chunk(chunk_size, check=False)
        listed = tokens(make(*pairs))
        assert [tokens(chunk) for chunk in chunks] == [
            listed[at : at + chunk_size] for at in range(0, len(listed), chunk_size)
        ]
        assert not any(one.is_empty() for chunk in chunks for one in chunk)

    @pytest.mark.parametrize("error", [ValueError, AssertionError])
    def test_of_ranges_that_overlap(self, error: type[Exception]) -> None:
        with pytest.raises(error, match="must not overlap"):
            make((8, 14), (5, 10)).chunk(8)

    def test_of_size_0(self) -> None:
        with pytest.raises(ValueError, match="at least 1, got 0"):
            make((0, 5)).chunk(0)


class TestTwoLists:
    def test_holes_and_overlaps(self) -> None:
        mine, theirs = make((0, 10), (20, 30), (40, 50)), make((5, 25), (35, 45))
        assert mine.find_hole_ranges(theirs) == make((0, 5), (25, 30), (45, 50))
        assert mine.find_overlap_ranges(other_attn_ranges=theirs) == make((5, 10), (20, 25), (40, 45))
        assert mine == make((0, 10), (20, 30), (40, 50))

    @given(some_pairs, some_pairs, st.booleans(), st.booleans())
    def test_against_sets(
        self, my_pairs: Pairs, their_pairs: Pairs, is_self_merged: bool, is_other_merged: bool
    ) -> None:
        mine, theirs = make(*my_pairs), make(*their_pairs)
        held, others = set(tokens(mine)), set(tokens(theirs))
        listed = Counter(tokens(mine)) + Counter(tokens(theirs))
        assert mine.intersect_size_with(theirs) == sum(listed[token] - 1 for token in held & others)

        mine = mine.merge() if is_self_merged else mine
        theirs = theirs.merge() if is_other_merged else theirs
        flags = {"is_self_merged": is_self_merged, "is_other_merged": is_other_merged}
        assert mine.find_hole_ranges(theirs, **flags).to_naive_ranges() == merged_pairs(held - others)
        assert mine.find_overlap_ranges(theirs, **flags).to_naive_ranges() == merged_pairs(held & others)

    def test_intersect_size_with_a_list_that_repeats(self) -> None:
        assert make((5, 15), (25, 35)).intersect_size_with(make((10, 20), (30, 40))) == 10
        assert make((5, 15), (5, 15)).intersect_size_with(make((5, 15))) == 20
        assert make((5, 10)).intersect_size_with(AttnRanges()) == 0


class TestLocal:
    ranges = make((20, 30), (0, 10), (30, 35), (40, 50))

    def test_in_the_coordinates_of_the_merged_ranges(self) -> None:
        local = self.ranges.make_ranges_local(make((25, 32), (2, 8), (42, 45), (10, 10), (20, 20)))
        assert local == make((15, 22), (2, 8), (27, 30), (10, 10), (10, 10))
        assert self.ranges.make_range_local(AttnRange(23, 32)) == (AttnRange(13, 22), AttnRange(20, 35))

    @given(some_pairs, st.data())
    def test_against_positions(self, pairs: Pairs, data: st.DataObject) -> None:
        ranges = make(*pairs).clear_empty()
        merged = ranges.merge()
        if merged.is_empty():
            return
        position = {token: at for at, token in enumerate(tokens(merged))}
        whole = [data.draw(st.sampled_from(list(merged))) for _ in range(3)]
        parts = [
            AttnRange(*sorted((data.draw(st.integers(one.start, one.end)), data.draw(st.integers(one.start, one.end)))))
            for one in whole
        ]
        wanted = AttnRanges.from_ranges(parts)
        local = ranges.make_ranges_local(wanted)
        assert local == merged.make_ranges_local(wanted, is_self_merged=True)
        offsets = [position[one.start] for one in merged]
        for part, one, host in zip(parts, local, whole, strict=True):
            assert tokens(make(one.to_naive_range())) == [position[token] for token in range(part.start, part.end)]
            assert ranges.make_range_local(part) == (one, host)
            assert merged.make_range_local(part, is_self_merged=True, prefix_offset=offsets) == (one, host)

    @pytest.mark.parametrize("outside", [(60, 70), (5, 25), (25, 45), (-3, -1), (33, 36)])
    def test_of_a_range_that_is_not_inside_one(self, outside: tuple[int, int]) -> None:
        message = rf"The attn_range \[{outside[0]}, {outside[1]}\) .*\[\[0, 10\), \[20, 35\), \[40, 50\)\]"
        with pytest.raises(ValueError, match=message):
            self.ranges.make_range_local(AttnRange(*outside))
        with pytest.raises(ValueError, match=message):
            self.ranges.make_ranges_local(make((2, 8), outside))
        with pytest.raises(ValueError, match="The attn_range"):
            AttnRanges().make_range_local(AttnRange(*outside))
        with pytest.raises(ValueError, match="The attn_range"):
            AttnRanges().make_ranges_local(make(outside))

    def test_offsets_of_another_number_of_ranges(self) -> None:
        with pytest.raises(ValueError, match="each of the 3 merged ranges, got 1"):
            self.ranges.make_range_local(AttnRange(2, 3), prefix_offset=[0])

    def test_message_about_a_long_list_stays_short(self) -> None:
        with pytest.raises(ValueError, match="and 984 more") as caught:
            make(*((10 * at, 10 * at + 5) for at in range(1000))).make_range_local(AttnRange(7, 8))
        assert len(str(caught.value)) < 1000


def test_a_hundred_thousand_ranges() -> None:
    """Each step well below what comparing pairs of ranges would take; the limit leaves room for a busy machine."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 10_000_000, 100_000)
    mine = AttnRanges.from_ranges(np.stack([starts, starts + rng.integers(0, 200, 100_000)], axis=1).tolist())
    theirs = AttnRanges.from_ranges([(one.start + 50, one.end + 50) for one in mine])
    began = time.perf_counter()
    merged = mine.merge()
    holes, overlaps = mine.find_hole_ranges(theirs), mine.find_overlap_ranges(theirs)
    local = mine.make_ranges_local(mine)
    assert holes.total_seqlen + overlaps.total_seqlen == merged.total_seqlen
    assert local.total_seqlen == mine.total_seqlen
    assert local.end == merged.total_seqlen
    assert sum(chunk.total_seqlen for chunk in merged.chunk(512)) == merged.total_seqlen
    assert mine.to_tensor().shape == (100_000, 2)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("pairs", "alignment", "expected"),
    [
        ([[5, 9], [0, 3], [8, 12]], 1, [(0, 3), (5, 12)]),
        ([[5, 9], [0, 3], [8, 12]], 2, [(0, 12)]),
        ([[5, 9], [17, 18]], 4, [(4, 12), (16, 20)]),
        ([[5, 9], [13, 14]], 4, [(4, 16)]),
        ([[0, 3], [3, 3]], 1, [(0, 3)]),
        ([], 4, []),
    ],
)
def test_merge_with_split_alignment(pairs: list[list[int]], alignment: int, expected: list[tuple[int, int]]) -> None:
    ranges = AttnRanges.from_ranges(pairs)
    assert ranges.merge_with_split_alignment(alignment).to_naive_ranges() == expected
    assert ranges == AttnRanges.from_ranges(pairs)


def test_split_alignment_is_positive() -> None:
    with pytest.raises(ValueError, match="split_alignment must be at least 1, got 0"):
        AttnRanges().merge_with_split_alignment(0)
