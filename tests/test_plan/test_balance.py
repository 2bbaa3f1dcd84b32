"""Dispatch that balances area: what each algorithm guarantees, against all assignments there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.config import DispatchConfig, DistAttnConfig, DPDispatchAlg, LBDispatchAlg
from magi_attention.mask import causal
from magi_attention.mask.bands import Ints
from magi_attention.plan import balance, build_plan
from magi_attention.plan.balance import MOST_CHUNKS_EXACT, lower_bound

BY_NAME: dict[str, Callable[[Ints, int, int], Ints]] = {
    "min-heap": balance.min_heap,
    "sequential": balance.sequential,
    "sorted-sequential": balance.sorted_sequential,
    "binary-search": balance.binary_search,
    "dynamic-programming": balance.dynamic_programming,
}


def largest(areas: Ints, owner: Ints, num_ranks: int) -> int:
    return int(np.bincount(owner, weights=areas, minlength=num_ranks).max())


def least_by_trying_all(areas: Ints, num_ranks: int, max_chunks: int) -> int:
    best = int(areas.sum())
    for owner in itertools.product(range(num_ranks), repeat=len(areas)):
        at = np.array(owner)
        if np.bincount(at, minlength=num_ranks).max() <= max_chunks:
            best = min(best, largest(areas, at, num_ranks))
    return best


# Areas of masks: many equal, some empty, a few huge.
AREAS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 1000)), min_size=1, max_size=7)


@given(AREAS, st.integers(1, 3))
def test_exact_search_bounds_and_the_others(values: list[int], num_ranks: int) -> None:
    areas = np.array(values, np.int64)
    max_chunks = -(-len(areas) // num_ranks)
    least = least_by_trying_all(areas, num_ranks, max_chunks)
    exact = balance.dynamic_programming(areas, num_ranks, max_chunks)
    assert largest(areas, exact, num_ranks) == least
    assert lower_bound(areas, num_ranks, max_chunks) <= least
    found = {
        name: largest(areas, function(areas, num_ranks, max_chunks), num_ranks) for name, function in BY_NAME.items()
    }
    assert min(found.values()) == least
    assert found["binary-search"] <= found["min-heap"]


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=60), st.integers(1, 9), st.sampled_from(sorted(BY_NAME)))
def test_every_chunk_has_an_owner_and_no_rank_too_many(values: list[int], num_ranks: int, name: str) -> None:
    areas = np.array(values[: MOST_CHUNKS_EXACT - 4] if name == "dynamic-programming" else values, np.int64)
    max_chunks = -(-len(areas) // num_ranks)
    owner = BY_NAME[name](areas, num_ranks, max_chunks)
    assert owner.shape == areas.shape
    counts = np.bincount(owner, minlength=num_ranks)
    assert len(counts) == num_ranks and counts.max() <= max_chunks
    assert largest(areas, owner, num_ranks) >= lower_bound(areas, num_ranks, max_chunks)
    if len(areas) % num_ranks == 0:
        assert (counts == max_chunks).all()


def test_bound_is_reached_where_chunks_are_equal() -> None:
    areas = np.full(24, 7, np.int64)
    for name in ("min-heap", "sequential", "sorted-sequential", "binary-search"):
        assert largest(areas, BY_NAME[name](areas, 8, 3), 8) == lower_bound(areas, 8, 3) == 21


@pytest.mark.parametrize(
    ("values", "num_ranks", "bound"),
    [
        ([10, 10, 10], 2, 20),  # two of three chunks meet
        ([9, 1, 1, 1], 2, 9),  # one chunk is larger than the mean
        ([3, 3, 2, 2], 2, 5),  # the mean
        ([5, 5, 4, 4, 4], 2, 12),  # three of five chunks meet, the mean is 11
    ],
)
def test_lower_bound_by_hand(values: list[int], num_ranks: int, bound: int) -> None:
    areas = np.array(values, np.int64)
    assert lower_bound(areas, num_ranks, -(-len(values) // num_ranks)) == bound


def test_min_heap_by_hand() -> None:
    # 9 to rank 0, 7, 6 to rank 1, 5 to rank 0, 1 to rank 1, which is then full.
    owner = balance.min_heap(np.array([5, 9, 1, 7, 6, 0], np.int64), 2, 3)
    assert owner.tolist() == [0, 0, 1, 1, 1, 0]


def plan_with(alg: DPDispatchAlg | LBDispatchAlg, chunk_size: int) -> None:
    build_plan(causal(64), 2, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=chunk_size, alg=alg)))


def test_an_algorithm_that_only_bounds_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"LBDispatchAlg only bounds .*\(here 1,040 cells\).*use BSDispatchAlg or MinHeapDispatchAlg"
    ):
        plan_with(LBDispatchAlg(), 8)


def test_an_algorithm_for_few_chunks_says_so() -> None:
    plan_with(DPDispatchAlg(), 8)
    with pytest.raises(
        ValueError, match=r"DPDispatchAlg .* at most 12 of them, got 16; use BSDispatchAlg.*or a larger chunk_size"
    ):
        plan_with(DPDispatchAlg(), 4)
