"""Windows cut into slices: exactly the cells, each once, and no set of slices is smaller."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.mask.bands import tighten, to_dense
from magi_attention.mask.window import check_window, window_bands, window_slices

# A set of cells of one small sample is an int: cell (i, j) is bit i * num_k + j.
Cells = int
Window = tuple[int, int]


def dense_window(sq: int, sk: int, window: Window, num_global: int) -> np.ndarray:
    """``[sq, sk]`` bool, cell by cell as the public contract words it."""
    left, right = window
    seen = np.zeros((sq, sk), bool)
    for i in range(max(0, sq - sk), sq):
        for j in range(sk):
            is_left = left == -1 or j >= i + sk - sq - left
            is_right = right == -1 or j <= i + sk - sq + right
            seen[i, j] = is_right and (is_left or j < num_global)
    return seen


def dense_slice(q0: int, q1: int, k0: int, k1: int, kind: int, sq: int, sk: int) -> np.ndarray:
    """``[sq, sk]`` bool, cell by cell as the public table of types words it."""
    seen = np.zeros((sq, sk), bool)
    for i in range(q0, q1):
        for j in range(k0, k1):
            seen[i, j] = (kind in (0, 2) or j - i <= k1 - q1) and (kind in (0, 1) or j - i >= k0 - q0)
    return seen


def as_cells(dense: np.ndarray) -> Cells:
    return sum(1 << int(at) for at in np.flatnonzero(dense))


@cache
def all_slices(sq: int, sk: int) -> tuple[Cells, ...]:
    """What any slice of any type can attend of a sample."""
    found = set()
    for q0 in range(sq):
        for q1 in range(q0 + 1, sq + 1):
            for k0 in range(sk):
                for k1 in range(k0 + 1, sk + 1):
                    found |= {as_cells(dense_slice(q0, q1, k0, k1, kind, sq, sk)) for kind in range(4)}
    return tuple(found - {0})


@cache
def fewest(wanted: Cells, sq: int, sk: int) -> int:
    """The size of the smallest set of slices that attends ``wanted``, each cell once, by trying all."""
    by_lowest: dict[Cells, list[Cells]] = {}
    for cells in all_slices(sq, sk):
        if not cells & ~wanted:
            by_lowest.setdefault(cells & -cells, []).append(cells)

    def can_cover(rest: Cells, num_slices: int) -> bool:
        if not rest or not num_slices:
            return not rest
        # The lowest cell that is left is the lowest cell of the slice that takes it: all before it are taken.
        options = by_lowest.get(rest & -rest, [])
        return any(not cells & ~rest and can_cover(rest ^ cells, num_slices - 1) for cells in options)

    return next(size for size in range(sq * sk + 1) if can_cover(wanted, size))


def check_every_window(most_keys: int) -> None:
    sizes = [(sq, sk) for sk in range(most_keys + 1) for sq in range(most_keys + 3)]
    # All samples at once, each with room around it, so that a slice of one that reaches into another is seen.
    q_starts = np.cumsum([0, *(sq + 2 for sq, _ in sizes)])[:-1] + 3
    k_starts = np.cumsum([0, *(sk + 1 for _, sk in sizes)])[:-1] + 1
    q_ranges = [[start, start + sq] for start, (sq, _) in zip(q_starts.tolist(), sizes, strict=True)]
    k_ranges = [[start, start + sk] for start, (_, sk) in zip(k_starts.tolist(), sizes, strict=True)]
    sides = range(-1, most_keys + 1)
    for window in ((left, right) for left in sides for right in sides):
        for num_global in range(most_keys + 2):
            found = window_slices(np.array(q_ranges), np.array(k_ranges), window, num_global)
            slices = np.concatenate([found[0], found[1], found[2][:, None]], axis=1)
            sample = np.searchsorted(q_starts, slices[:, 0], side="right") - 1
            assert (np.diff(sample) >= 0).all()
            for at, (sq, sk) in enumerate(sizes):
                base = [q_starts[at]] * 2 + [k_starts[at]] * 2 + [0]
                check_sample((slices[sample == at] - base).tolist(), sq, sk, window, num_global)


def check_sample(slices: list[list[int]], sq: int, sk: int, window: Window, num_global: int) -> None:
    case = f"{sq=} {sk=} {window=} {num_global=} {slices=}"
    assert all(0 <= q0 < q1 <= sq and 0 <= k0 < k1 <= sk for q0, q1, k0, k1, _ in slices), case
    count = sum(
        (dense_slice(q0, q1, k0, k1, kind, sq, sk).astype(int) for q0, q1, k0, k1, kind in slices), np.zeros((sq, sk))
    )
    wanted = dense_window(sq, sk, window, num_global)
    assert np.array_equal(count, wanted), case
    rows = min(sq, sk)
    assert len(slices) == fewest(as_cells(wanted[sq - rows :]), rows, sk), case


def test_exact_disjoint_and_fewest() -> None:
    check_every_window(most_keys=5)


@pytest.mark.long
def test_exact_disjoint_and_fewest_of_more_keys() -> None:
    check_every_window(most_keys=8)


@pytest.mark.parametrize(
    ("sq", "sk", "window", "num_global", "expected"),
    [
        (100, 100, (-1, -1), 0, 1),  # full
        (100, 100, (-1, 0), 0, 1),  # causal
        (100, 100, (0, -1), 0, 1),  # its mirror image
        (100, 100, (10, 0), 0, 2),
        (100, 100, (10, 5), 0, 3),
        (50, 100, (10, 5), 0, 2),  # the first query's window does not reach the first key
        (50, 100, (10, 0), 0, 1),
        (100, 50, (10, 0), 0, 2),
        (100, 100, (99, 99), 0, 1),
        (100, 100, (10, 0), 4, 3),
        (100, 100, (10, 5), 4, 4),
        (100, 100, (10, 0), 100, 1),
        (1, 1, (0, 0), 0, 1),
        (0, 5, (1, 1), 2, 0),
        (5, 0, (1, 1), 2, 0),
    ],
)
def test_number_of_slices(sq: int, sk: int, window: Window, num_global: int, expected: int) -> None:
    assert len(window_slices(np.array([[0, sq]]), np.array([[0, sk]]), window, num_global)[2]) == expected


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
    st.tuples(st.integers(-1, 45), st.integers(-1, 45)),
    st.integers(0, 45),
)
def test_larger_samples(sizes: list[tuple[int, int]], window: Window, num_global: int) -> None:
    ends = np.cumsum([(0, 0), *sizes], axis=0)
    q_ranges, k_ranges = (np.stack([ends[:-1, side], ends[1:, side]], axis=1) for side in (0, 1))
    wanted = np.zeros((ends[-1, 0], ends[-1, 1]), int)
    for (sq, sk), (q0, k0) in zip(sizes, ends.tolist(), strict=False):
        wanted[q0 : q0 + sq, k0 : k0 + sk] = dense_window(sq, sk, window, num_global)
    found = np.zeros_like(wanted)
    q, k, types = window_slices(q_ranges, k_ranges, window, num_global)
    for (q0, q1), (k0, k1), kind in zip(q.tolist(), k.tolist(), types.tolist(), strict=True):
        found += dense_slice(q0, q1, k0, k1, kind, *wanted.shape)
    assert np.array_equal(found, wanted)
    assert len(types) <= 4 * len(sizes)

    bands = window_bands(q_ranges, k_ranges, window, num_global)
    assert np.array_equal(to_dense(bands, *wanted.shape), wanted)
    assert np.array_equal(tighten(bands)[0], bands)
    assert len(bands) <= (2 if num_global else 1) * len(sizes)


def test_thousands_of_samples_are_cut_alike() -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 3000)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    pairs = np.stack([ends[:-1], ends[1:]], axis=1)
    q, k, types = window_slices(pairs, pairs, (64, 8), 4)
    sample = np.searchsorted(ends, q[:, 0], side="right") - 1
    for at in (0, 1, 1234, 2999):
        alone = window_slices(pairs[at : at + 1], pairs[at : at + 1], (64, 8), 4)
        for together, one in zip((q, k, types), alone, strict=True):
            assert np.array_equal(together[sample == at], one)


@pytest.mark.parametrize("window", [(1,), (1, 2, 3), (-2, 0), (0, -5), (1.5, 0), ("1", 0), (None, 0)])
def test_window_that_is_none(window: Sequence[object]) -> None:
    with pytest.raises(ValueError, match=r"two ints \(left, right\).*-1 for all; got"):
        check_window(window)  # type: ignore[arg-type]


def test_window_of_a_list_or_numpy_ints() -> None:
    assert check_window([np.int64(3), -1]) == (3, -1)
