"""Threads share the plan cache: look-ups, insertions and evictions are one step each, and equal keys are one key."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from magi_attention.api import (
    DistAttnRuntimeKey,
    calc_attn,
    clear_cache,
    dispatch,
    get_most_recent_key,
    magi_attn_varlen_key,
    plan_of,
)
from magi_attention.mask import causal
from magi_attention.plan import build_plan
from magi_attention.runtime import cache

NUM_THREADS = 4


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    clear_cache()
    yield
    sys.setswitchinterval(before)
    clear_cache()


def in_threads(work: Callable[[int], object]) -> None:
    """Run ``work(number)`` in every thread; raise what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(NUM_THREADS)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def make_key(length: int) -> DistAttnRuntimeKey:
    return magi_attn_varlen_key([0, length], [0, length], 2, 1, 8, causal=True)


def test_a_small_cache_under_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "2")

    def work(number: int) -> None:
        chosen = random.Random(number)
        for _ in range(150):
            length = chosen.randint(16, 21)
            refusal = refusal_of_use(length)
            assert refusal is None or "it was evicted from the cache" in refusal  # by another thread's keys
            if chosen.random() < 0.02:
                clear_cache()
            assert isinstance(get_most_recent_or_none(), (DistAttnRuntimeKey, type(None)))

    in_threads(work)
    assert refusal_of_use(16) is None


def test_look_ups_among_evictions() -> None:
    sessions = [cache.get_session(make_key(length)) for length in (16, 17, 18)]

    def work(number: int) -> None:
        for at in range(20_000):
            cache.put_session(sessions[(number + at) % 3], 1)
            found = cache.find_session(sessions[number % 3].key)
            assert found is None or found is sessions[number % 3]

    in_threads(work)


def refusal_of_use(length: int) -> str | None:
    try:
        key = make_key(length)
        assert len(dispatch(torch.zeros(length, 1), key)) >= length  # and padding
    except ValueError as error:
        return str(error)
    return None


def get_most_recent_or_none() -> DistAttnRuntimeKey | None:
    try:
        return get_most_recent_key()
    except ValueError:
        return None


def test_equal_keys_are_one_key_and_one_plan() -> None:
    for length in range(30, 40):
        keys: list[DistAttnRuntimeKey] = []
        in_threads(lambda _, length=length, keys=keys: keys.append(make_key(length)))  # type: ignore[misc]
        assert all(key is keys[0] for key in keys)
        assert len({id(plan_of(key)) for key in keys}) == 1


def test_threads_that_share_a_key_compute_alike() -> None:
    key = make_key(24)
    q, k, v = (torch.randn(24, heads, 8) for heads in (2, 1, 1))
    expected = calc_attn(q, k, v, make_key(24))[0]
    for _ in range(5):
        clear_cache()
        key = make_key(24)

        def work(_: int, key: DistAttnRuntimeKey = key) -> None:
            assert torch.equal(calc_attn(q, k, v, key)[0], expected)

        in_threads(work)


def test_threads_that_share_a_plan_find_its_parts() -> None:
    for _ in range(3):
        plan = build_plan(causal(96), 8, ranks_per_node=2)
        alone = build_plan(causal(96), 8, ranks_per_node=2)
        found: list[list[int]] = [[] for _ in range(NUM_THREADS)]
        in_threads(
            lambda number, plan=plan, found=found: found[number].extend(  # type: ignore[misc]
                plan.rank(rank).stages[0].exchange.num_received for rank in range(8)
            )
        )
        assert found == [[alone.rank(rank).stages[0].exchange.num_received for rank in range(8)]] * NUM_THREADS


def test_a_destructor_may_clear_the_cache() -> None:
    """The garbage collector runs in whichever thread holds the lock, so the lock is re-entrant."""
    with cache._lock:
        clear_cache()
    with pytest.raises(ValueError, match="no key was made"):
        get_most_recent_key()
