"""Simplifying keeps every cell, finds the one row that was cut into many, and tells of cells listed twice."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from mask_cases import CASES, any_mask, in_pieces

from magi_attention.mask import AttnMask
from magi_attention.mask.bands import area
from magi_attention.mask.simplify import hull


def row_by_row(mask: AttnMask) -> AttnMask:
    """Every query's cells as a row of its own."""
    from magi_attention.mask.bands import split_q

    edges = np.arange(mask.num_q + 1)
    return AttnMask(split_q(mask.bands, edges[:-1], edges[1:])[0], mask.num_q, mask.num_k)


@pytest.mark.parametrize("num_cases", CASES)
def test_cells_stay_and_rows_do_not_grow(num_cases: int) -> None:
    rng = np.random.default_rng(11)
    for _ in range(num_cases):
        mask = in_pieces(rng, any_mask(rng))
        simple = mask.simplify()
        simple.validate()
        np.testing.assert_array_equal(simple.to_dense(), mask.to_dense())
        assert len(simple.bands) <= len(mask.bands)


@pytest.mark.parametrize("num_cases", CASES)
def test_no_two_rows_of_the_result_are_one_row(num_cases: int) -> None:
    rng = np.random.default_rng(12)
    for _ in range(num_cases // 10):
        bands = in_pieces(rng, any_mask(rng)).simplify().bands
        pairs = np.array(list(itertools.combinations(range(len(bands)), 2)), np.int64).reshape(-1, 2)
        first, second = bands[pairs[:, 0]], bands[pairs[:, 1]]
        assert (area(hull(first, second)) > area(first) + area(second)).all()


@pytest.mark.parametrize("num_cases", CASES)
def test_one_row_cut_into_a_grid_comes_back(num_cases: int) -> None:
    rng = np.random.default_rng(13)
    for _ in range(num_cases):
        q0, k0 = rng.integers(0, 5, 2).tolist()
        q1, k1 = q0 + int(rng.integers(1, 12)), k0 + int(rng.integers(1, 12))
        lo, hi = sorted(rng.integers(k0 - q1 - 1, k1 - q0 + 1, 2).tolist())
        whole = AttnMask.full(20, 20).intersection(AttnMask(np.array([[q0, q1, k0, k1, lo, hi]]), 20, 20))
        assert in_pieces(rng, whole).simplify() == whole
        assert row_by_row(whole).simplify() == whole


def test_slices_of_the_four_types_become_rows_again() -> None:
    for mask in (AttnMask.sliding_window(50, (7, 3)), AttnMask.varlen([0, 9, 30], window_size=(4, 0))):
        assert AttnMask.from_slices(*mask.to_slices()).simplify() == mask


def test_two_halves_of_a_square_are_one() -> None:
    halves = AttnMask.from_slices([(0, 9)] * 2, [(0, 9), (1, 9)], ["causal", "inv_causal"])
    assert halves.simplify() == AttnMask.full(9)


@pytest.mark.parametrize(
    "mask",
    [
        AttnMask.chunked_causal(100_000, 8192),
        AttnMask.chunked_causal(100_000, 1000),
        AttnMask.sliding_window(100_000, (511, 0)),
        AttnMask.varlen_block_causal([0, 40_000, 100_000], 2048),
        AttnMask.prefix_lm(100_000, 777),
    ],
    ids=["chunked_causal", "small_chunks", "window", "block_causal", "prefix_lm"],
)
def test_a_row_a_token_becomes_the_few_rows_of_the_family(mask: AttnMask) -> None:
    slices = row_by_row(mask)
    assert len(slices.bands) >= 100_000
    assert slices.simplify() == mask.simplify()
    assert len(slices.simplify().bands) <= len(mask.bands)


def test_nested_rows_are_dropped() -> None:
    rng = np.random.default_rng(14)
    mask = AttnMask.from_slices([(0, 8), (2, 5), (2, 5), (8, 9)], [(0, 8), (1, 4), (1, 4), (0, 8)], [0, 1, 0, 0])
    assert mask.simplify() == AttnMask.full(9, 8)
    for _ in range(100):
        mask = any_mask(rng)
        doubled = AttnMask(rng.permutation(np.concatenate([mask.bands, mask.bands[::2]])), mask.num_q, mask.num_k)
        np.testing.assert_array_equal(doubled.simplify().to_dense(), mask.to_dense())


def test_many_rows_that_are_listed_twice_take_little_memory() -> None:
    ranges = np.stack([np.arange(1500), np.full(1500, 3000)], axis=1)
    nested = AttnMask.from_slices(np.repeat(ranges, 2, axis=0), [(0, 3000)] * 3000)
    tracemalloc.start()
    assert nested.simplify() == AttnMask.full(3000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 30
    tracemalloc.stop()


def test_cells_listed_twice_are_told_with_their_place() -> None:
    mask = AttnMask.from_slices([(0, 4), (3, 6)], [(0, 4), (2, 6)])
    with pytest.raises(ValueError, match=r"cell \(query 3, key 2\) is attended by two of them: queries \[0, 4\)"):
        mask.simplify()


def test_a_mask_of_nothing() -> None:
    assert AttnMask.full(4, 0).simplify() == AttnMask.full(4, 0)
