"""A collective under way, and what is to be done when it has arrived."""

from __future__ import annotations

import atexit
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.failure import Call, CommTimeoutError, describe_failure
from magi_attention.comm.watch import Watched, watch

T = TypeVar("T")
U = TypeVar("U")

_num_started: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()

# How long an exiting process waits for `_handed_over` to be let go of, which takes what is left of a collective.
SECONDS_FOR_THREADS = 1.0
_handed_over: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_numbers = itertools.count()


@atexit.register
def _wait_for_threads() -> None:
    """Let gloo's threads let go of the tensors of collectives that have landed.

    They do so a moment after the wait is over, and need the interpreter for it; one that is ending gives them none, and the process aborts.
    """
    deadline = time.monotonic() + SECONDS_FOR_THREADS
    while _handed_over and time.monotonic() < deadline:
        time.sleep(0.001)


@dataclass(frozen=True)
class Flight:
    """A collective that was started, and its ``buffers``, which must live until it has landed."""

    work: dist.Work
    buffers: tuple[Tensor, ...]
    watched: Watched

    def land(self) -> None:
        """Wait for it: the host on gloo, the current stream on NCCL.

        Raises:
            CommTimeoutError: a peer did not take part in time, or is gone. (NCCL tells of neither here unless TORCH_NCCL_BLOCKING_WAIT is
                set: its watchdog ends the process after the group's timeout. Who was missing is logged before, see ``comm.watch``.)
        """
        try:
            self.work.wait()
        except RuntimeError as error:
            raise _failure(self.watched, error) from error
        self.watched.land(self.buffers[0].device)


def start(
    collective: Callable[[], dist.Work | None],
    buffers: tuple[Tensor, ...],
    group: dist.ProcessGroup,
    label: str,
    sources: Sequence[int],
    targets: Sequence[int],
) -> Flight:
    """Start an asynchronous collective. Every rank of the group must start the same ones in the same order, empty or not.

    ``buffers``: the tensors that ``collective`` hands over; views that nobody else holds, so that their end is the end of its use of them.
    """
    number = _num_started.get(group, 0)
    _num_started[group] = number + 1
    watched = watch(Call(group, number, label, sources, targets), buffers[0].device)
    try:
        work = collective()
    except dist.DistError as error:  # NCCL meets its peers here the first time
        raise _failure(watched, error) from error
    assert work is not None, "this rank is not in the group"
    _handed_over.update((next(_numbers), buffer) for buffer in buffers)
    watched.begin(work)
    return Flight(work, buffers, watched)


def _failure(watched: Watched, cause: Exception) -> CommTimeoutError:
    return describe_failure(watched.call, time.monotonic() - watched.started, cause)


class Pending(Generic[T]):
    """A result under way."""

    def __init__(self, flight: Flight | None, finish: Callable[[], T]) -> None:
        self._flight = flight
        self._finish: Callable[[], T] | None = finish
        self._result: list[T] = []

    def wait(self) -> T:
        """The result; asked again, the same. Device work that makes it is queued on the current stream.

        Raises:
            CommTimeoutError: see `Flight.land`.
        """
        if self._finish is not None:
            if self._flight is not None:
                self._flight.land()
            with torch.no_grad():
                self._result.append(self._finish())
            self._flight = self._finish = None
        return self._result[0]

    def then(self, step: Callable[[T], U]) -> Pending[U]:
        """This, followed by ``step`` on the result when it is waited for."""
        return Pending(None, lambda: step(self.wait()))
