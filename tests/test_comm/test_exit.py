"""A process that exits right behind its last collective: gloo's threads may still hold its tensors, and are waited for."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from magi_attention.comm import all_reduce_max, gather_rows, pending
from magi_attention.testing.dist import shared_pool


def use_collectives() -> tuple[int, float, float]:
    group = dist.group.WORLD
    for width in (8, 3):  # rows that travel as wide integers, and as bytes
        whole = gather_rows(torch.ones(2, width, dtype=torch.uint8), [2, 2, 2], group)
    most = all_reduce_max(torch.ones(1), group)
    started = time.monotonic()
    pending._wait_for_threads()
    # The results are alive; what was handed over is not, on any thread.
    return len(pending._handed_over), time.monotonic() - started, (whole.sum() + most.sum()).item()


def test_what_collectives_are_given_ends_with_them() -> None:
    for num_left, seconds, total in shared_pool().run(use_collectives, num_ranks=3):
        assert num_left == 0
        assert seconds < pending.SECONDS_FOR_THREADS
        assert total == 6 * 3 + 1


def test_waits_for_a_thread_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [torch.zeros(1)]
    pending._handed_over[next(pending._numbers)] = held[0]
    thread = threading.Timer(0.1, held.clear)
    thread.start()
    pending._wait_for_threads()
    assert not held
    thread.join()
    kept = torch.zeros(1)
    pending._handed_over[next(pending._numbers)] = kept
    monkeypatch.setattr(pending, "SECONDS_FOR_THREADS", 0.05)
    pending._wait_for_threads()  # not without end
