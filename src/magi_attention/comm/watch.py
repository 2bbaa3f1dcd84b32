"""Who is missing, said before NCCL gives up.

A wait on NCCL puts the wait into a stream and returns, so no call of ours fails when a peer stays away: NCCL's own watchdog ends
the process after the group's timeout, without a word on who was waited for. A thread therefore keeps an eye on one collective of
each such group, and logs who is missing once nine tenths of the timeout have gone by.

It asks a collective how it stands only then, so that it is in nobody's way (a question to CUDA spoils a graph that is being captured).
Collectives of a group complete in order: the one it holds is either done, and the newest takes its place, or what all later ones wait for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from magi_attention.comm.failure import Call, describe_failure

logger = logging.getLogger("magi_attention")

# Of the group's timeout: what is left must do for a collective that was started a little before the one that is held.
_PATIENCE = 0.9
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


class Watched(NamedTuple):
    """A collective that began at ``started`` (monotonic seconds). It holds no tensors, which would live as long as it is watched."""

    call: Call
    started: float
    is_done: Callable[[], bool]


class Watch:
    """Of one group. ``timeout``: seconds that its collectives may take."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._newest: Watched | None = None
        self._held: Watched | None = None
        self._has_spoken = False

    def see(self, one: Watched) -> None:
        """A collective was started."""
        with self._lock:
            self._newest = one

    def look(self) -> str | None:
        """Once, where the collective that is held has taken too long: what is to be said of it."""
        with self._lock:
            if self._held is None:
                self._held, self._newest = self._newest, None
            held = self._held
        if held is None or time.monotonic() - held.started < _PATIENCE * self.timeout:
            return None
        if held.is_done():
            self._held = None
            return None
        if self._has_spoken:
            return None
        self._has_spoken = True
        left = f"it is still waited for; after {self.timeout:g} s this process will be ended"
        failure = describe_failure(held.call, time.monotonic() - held.started, RuntimeError(left))
        return f"about to give up: {failure}"


_watches: WeakKeyDictionary[dist.ProcessGroup, Watch] = WeakKeyDictionary()
_lock = threading.Lock()
_threads: list[threading.Thread] = []


def watch(call: Call, started: float, device: torch.device) -> None:
    """Keep an eye on a collective that the current stream has just been made to wait for, where nobody else says who is missing."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if call.group not in _watches:
            timeout = _timeout_of(call.group, device)
            if timeout is None:
                return
            _watches[call.group] = Watch(timeout)
        own = _watches[call.group]
        if not _threads:
            _threads.append(threading.Thread(target=_keep_looking, name="magi_attention watch", daemon=True))
            _threads[0].start()
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    own.see(Watched(call, started, event.query))


def _timeout_of(group: dist.ProcessGroup, device: torch.device) -> float | None:
    """Seconds, of a group on NCCL; None of others, whose waits fail by themselves."""
    backend = group._get_backend(device)
    if backend.name() != "nccl":
        return None
    return float(backend.options._timeout.total_seconds())


def _keep_looking() -> None:
    while True:
        with _lock:
            watches = list(_watches.values())
        for one in watches:
            if said := one.look():
                logger.error(said)
        time.sleep(min([_MOST_SECONDS_BETWEEN_LOOKS, *(0.02 * one.timeout for one in watches)]))
