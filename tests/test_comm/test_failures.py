"""A peer that never comes, or is gone, ends the wait of the others with an error that names it."""

from __future__ import annotations

import datetime
import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.comm import CommTimeoutError, Pending, all_reduce_max, gather_rows, group_cast, group_reduce
from magi_attention.comm.failure import Call
from magi_attention.comm.transport import all_to_all_rows
from magi_attention.comm.watch import Watch, Watched
from magi_attention.plan import Exchange
from magi_attention.testing.dist import RankError, RankPool

GROUP_SECONDS = 3.0
SUBGROUP_SECONDS = 1.5


@pytest.fixture(scope="module")
def pool() -> RankPool:
    with RankPool(3, timeout=30.0) as pool:
        yield pool


def everyone_sends_a_row(rank: int, size: int) -> Exchange:
    """Every rank sends its row 0 to every other."""
    splits = tuple(int(other != rank) for other in range(size))
    return Exchange(np.tile(np.array([[0, 1]]), (size - 1, 1)), splits, splits)


def lose_a_peer(collective: str, absent: int, how: str) -> tuple[str, float]:
    """``(message, seconds)`` of a collective that ``absent`` does not join. It stays alive, unless ``how`` is "leaves"."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    if rank == absent:
        if how == "leaves":
            dist.destroy_process_group()
        time.sleep(3.0 if how == "leaves" else GROUP_SECONDS + 2.5)
        return "absent", 0.0
    group, begin = dist.group.WORLD, time.monotonic()
    x = torch.ones(2, 3)
    try:
        if collective == "cast":
            # Two in flight: the first fails, and the second must not be waited for longer.
            exchange = everyone_sends_a_row(rank, size)
            first = group_cast((x, x), exchange, group, label="k/v of stage 0, forward")
            group_cast((x, x), exchange, group, label="k/v of stage 1, forward")
            first.wait()
        elif collective == "reduce":
            exchange = everyone_sends_a_row(rank, size)
            group_reduce((torch.ones(size - 1, 3),), (x,), exchange, group, label="dk/dv of stage 1").wait()
        else:
            gather_rows(x, [2] * size, group, label="rows of undispatch")
    except CommTimeoutError as error:
        return str(error), time.monotonic() - begin
    return "no error", time.monotonic() - begin


def test_a_peer_that_never_joins_is_named_after_the_timeout(pool: RankPool) -> None:
    answers = pool.run(lose_a_peer, "cast", 1, "stays", group_timeout=GROUP_SECONDS)
    for rank in (0, 2):
        message, seconds = answers[rank]
        assert f"collective #0 (k/v of stage 0, forward) failed on rank {rank} after " in message
        assert "Rows were due from ranks" in message and "No word from rank 1:" in message
        assert GROUP_SECONDS - 0.5 < seconds < GROUP_SECONDS + 4.0


@pytest.mark.parametrize("collective", ["reduce", "gather"])
def test_a_peer_that_is_gone_is_named_at_once(pool: RankPool, collective: str) -> None:
    answers = pool.run(lose_a_peer, collective, 2, "leaves", group_timeout=60.0)
    for rank in (0, 1):
        message, seconds = answers[rank]
        assert "No word from rank 2:" in message
        assert seconds < 5.0


def start_to_watch(eye: Watch) -> Pending[torch.Tensor]:
    """An exchange of a row with every rank, seen by ``eye``."""
    size = dist.get_world_size()
    rows, splits = torch.zeros(size, 8, dtype=torch.uint8), [1] * size
    pending = all_to_all_rows(rows, splits, splits, dist.group.WORLD, "k/v of stage 0")
    assert pending._flight is not None
    eye.see(pending._flight.watched)
    return pending


def watch_a_peer_that_stays_away() -> tuple[list[str | None], bool]:
    """What a watch says of a collective, look by look: before its patience is at an end, after, and once more; and whether it is stuck."""
    dist.barrier()
    said: list[str | None] = []
    eye = Watch(GROUP_SECONDS)
    if dist.get_rank() == 0:
        pending = start_to_watch(eye)
        said.append(eye.look())
        time.sleep(0.93 * GROUP_SECONDS)
        said += [eye.look(), eye.look()]
        del pending
    else:
        time.sleep(GROUP_SECONDS + 2.5)
    return said, eye.is_stuck()


def test_a_watch_names_who_is_missing_once_and_in_time(pool: RankPool) -> None:
    (early, late, again), is_stuck = pool.run(watch_a_peer_that_stays_away, group_timeout=GROUP_SECONDS)[0]
    assert early is None and again is None and not is_stuck
    assert late is not None and "collective #0 (k/v of stage 0)" in late
    assert "No word from ranks 1, 2:" in late and f"after {GROUP_SECONDS:g} s this process will be ended" in late


def watch_what_completes() -> list[str | None]:
    eye = Watch(0.01)
    said: list[str | None] = []
    for _ in range(3):
        start_to_watch(eye).wait()
        time.sleep(0.02)
        said += [eye.look(), eye.look()]
    return said


def test_a_watch_is_silent_on_what_completes(pool: RankPool) -> None:
    assert pool.run(watch_what_completes) == [[None] * 6] * 3


def watch_what_does_not_begin() -> tuple[bool, bool, str | None]:
    eye = Watch(0.5)
    eye.see(Watched(Call(dist.group.WORLD, 0, "k/v of stage 0", [1], [1]), time.monotonic()))
    eye.look()
    before = eye.is_stuck()
    time.sleep(0.6)
    return before, eye.is_stuck(), eye.look()


def test_a_watch_knows_a_call_that_does_not_return(pool: RankPool) -> None:
    for before, after, said in pool.run(watch_what_does_not_begin, num_ranks=2):
        assert not before and after
        assert said is not None and "collective #0 (k/v of stage 0)" in said


def lose_a_peer_of_a_subgroup() -> str:
    """Ranks are named as the user numbers them, not as the group does."""
    group = dist.new_group([1, 2], timeout=datetime.timedelta(seconds=SUBGROUP_SECONDS))
    if dist.get_rank() == 1:
        try:
            all_reduce_max(torch.ones(1), group)
        except CommTimeoutError as error:
            return str(error)
    time.sleep(SUBGROUP_SECONDS + 2.5)
    return ""


def test_global_ranks_are_named_in_a_subgroup(pool: RankPool) -> None:
    message = pool.run(lose_a_peer_of_a_subgroup)[1]
    assert "failed on rank 1 " in message and "No word from rank 2:" in message


def drift_apart() -> str:
    """Rank 0 exchanges rows while rank 1 takes part in something else."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=SUBGROUP_SECONDS))
    all_reduce_max(torch.ones(1), group)
    exchange = everyone_sends_a_row(dist.get_rank(), 2)
    try:
        if dist.get_rank() == 0:
            group_cast((torch.ones(1, 1),), exchange, group, label="k/v of stage 0, forward").wait()
        else:
            all_reduce_max(torch.ones(1), group)
    except CommTimeoutError as error:
        return str(error)
    return ""


def test_ranks_that_fail_in_different_collectives_say_so(pool: RankPool) -> None:
    first, second = pool.run(drift_apart, num_ranks=2)
    assert "collective #1 (k/v of stage 0, forward) failed on rank 0 " in first
    assert "All ranks report a failure. Rank 1 failed in collective #1 (max_logits)." in first
    assert "Rank 0 failed in collective #1 (k/v of stage 0, forward)." in second


def die() -> None:
    rank = dist.get_rank()
    dist.barrier()
    if rank == 0:
        os._exit(17)
    gather_rows(torch.ones(1), [1, 1, 1], dist.group.WORLD, label="rows of undispatch")


def test_a_rank_that_dies_is_named_by_the_others(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(die)
    tracebacks = caught.value.tracebacks
    assert "exit code 17" in tracebacks[0]
    for rank in (1, 2):
        assert "collective #0 (rows of undispatch)" in tracebacks[rank] and "No word from rank 0:" in tracebacks[rank]


def lose_the_store() -> str:
    """Rank 0 keeps the store in its own process, and dies."""
    rank, size, wait = dist.get_rank(), dist.get_world_size(), datetime.timedelta(seconds=20.0)
    server = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = torch.tensor([server.port if server else 0])
    dist.broadcast(port, 0)
    store = server or dist.TCPStore("127.0.0.1", int(port), size, is_master=False)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    dist.barrier()
    if rank == 0:
        os._exit(17)
    gather_rows(torch.ones(1), [1, 1], dist.group.WORLD)
    return ""


def test_a_lost_store_is_said_rather_than_waited_for(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(lose_the_store, num_ranks=2)
    said = caught.value.tracebacks[1]
    assert "collective #0 (gather_rows) failed on rank 1 " in said and "store does not answer" in said
