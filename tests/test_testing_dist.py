"""The helper that runs tests on ranks: what comes back, and that nothing it runs can hang or spoil the next run."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from magi_attention.testing.dist import RankError, RankPool, run_ranks


@pytest.fixture(scope="module")
def pool() -> RankPool:
    with RankPool(3, timeout=30.0) as pool:
        yield pool


def sum_of_ranks(offset: int) -> tuple[int, float, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), total.item() + offset, torch.arange(3).to(torch.bfloat16)


def test_results_come_back_by_rank(pool: RankPool) -> None:
    for num_ranks in (3, 1, 2):
        results = pool.run(sum_of_ranks, 10, num_ranks=num_ranks)
        assert [rank for rank, _, _ in results] == list(range(num_ranks))
        assert all(total == 10 + sum(range(num_ranks)) for _, total, _ in results)
        assert all(torch.equal(x, torch.arange(3).to(torch.bfloat16)) for _, _, x in results)


def test_run_ranks_starts_and_ends_its_own_processes() -> None:
    assert [total for _, total, _ in run_ranks(sum_of_ranks, 2, 1, timeout=30.0)] == [2.0, 2.0]


def raise_on_two() -> None:
    if dist.get_rank() == 1:
        raise KeyError("first of two")
    if dist.get_rank() == 2:
        time.sleep(0.3)
        raise ValueError("second of two")
    dist.barrier()


def test_every_failing_rank_is_told_whole_and_the_next_run_is_clean(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"raise_on_two failed on rank\(s\) 1, .* of 3") as caught:
        pool.run(raise_on_two)
    tracebacks = caught.value.tracebacks
    assert set(tracebacks) == {0, 1, 2} and next(iter(tracebacks)) == 1
    assert "KeyError: 'first of two'" in tracebacks[1] and "in raise_on_two" in tracebacks[1]
    assert "ValueError: second of two" in tracebacks[2]
    assert all(text.rstrip() in str(caught.value) for text in tracebacks.values())
    assert pool.run(sum_of_ranks, 0)[0][1] == 3.0


def linger() -> None:
    if dist.get_rank() == 0:
        time.sleep(60.0)


def test_a_rank_that_does_not_finish_is_ended_and_says_where_it_was(pool: RankPool) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match="did not finish within 1 s") as caught:
        pool.run(linger, timeout=1.0)
    assert time.monotonic() - begin < 10.0
    assert set(caught.value.tracebacks) == {0} and "in linger" in caught.value.tracebacks[0]


def crash() -> None:
    if dist.get_rank() == 2:
        os.abort()


def test_a_rank_that_crashes_says_how(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(crash)
    assert "SIGABRT" in caught.value.tracebacks[2] and "in crash" in caught.value.tracebacks[2]


def process_ids() -> int:
    return os.getpid()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_close_leaves_no_process() -> None:
    with RankPool(2) as pool:
        pids = pool.run(process_ids)
        assert all(map(is_alive, pids)) and pool.run(process_ids) == pids
    deadline = time.monotonic() + 5.0
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def state(name: str) -> tuple[str | None, torch.dtype, float]:
    """What a run finds, before it changes all of it."""
    found = os.environ.get(name), torch.get_default_dtype(), torch.rand(()).item()
    os.environ[name] = "left behind"
    torch.set_default_dtype(torch.float64)
    dist.destroy_process_group()
    return found


def test_runs_have_the_callers_environment_and_no_traces_of_each_other(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "MAGI_ATTENTION_TEST_OF_RANKS"
    first = pool.run(state, name)
    monkeypatch.setenv(name, "from the caller")
    second = pool.run(state, name)
    assert first[0][:2] == (None, torch.float32) and second[0][:2] == ("from the caller", torch.float32)
    assert first[0][2] == second[0][2] == second[2][2]


def unsendable() -> object:
    return lambda: 0


def test_what_cannot_travel_is_said(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="at the top of a module"):
        pool.run(lambda: 0)
    with pytest.raises(RankError, match="lambda"):
        pool.run(unsendable)
