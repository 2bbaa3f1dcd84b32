"""Who is missing, said before NCCL gives up; and an end where it never would.

A wait on NCCL puts the wait into a stream and returns, so no call of ours fails when a peer stays away: NCCL's own watchdog ends
the process after the group's timeout, without a word on who was waited for. And where NCCL is still connecting to a peer, which it does in
the call that starts a group's first exchange, not even the watchdog does that. A thread therefore keeps an eye on one
collective of each such group, logs who is missing once nine tenths of the timeout have gone by, and ends the process where the
call has not returned by the timeout.

It asks a collective how it stands only then, so that it is in nobody's way (a question to CUDA spoils a graph that is being captured).
Collectives of a group complete in order: the one it holds is either done, and the newest takes its place, or what all later ones wait for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from magi_attention.comm.failure import Call, describe_failure

logger = logging.getLogger("magi_attention")

# Of the group's timeout: what is left must do for a collective that was started a little before the one that is held.
_PATIENCE = 0.9
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(eq=False)
class Watched:
    """A collective from ``started`` (monotonic seconds) on. It holds no tensors, which would live as long as it is watched.

    ``work``: what the call that starts it has returned, once it has; whoever waits for it keeps it alive. ``event``: recorded behind
    it, once the current stream waits for it.
    """

    call: Call
    started: float
    work: ReferenceType[dist.Work] | None = None
    event: torch.cuda.Event | None = None

    @property
    def has_begun(self) -> bool:
        return self.work is not None

    def begin(self, work: dist.Work) -> None:
        """The call that starts it has returned."""
        self.work = ref(work)

    def land(self, device: torch.device) -> None:
        """The current stream of ``device`` has been made to wait for it."""
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))

    def is_done(self) -> bool:
        """Whether nothing is waited for any more. One that nobody waits for is."""
        if self.event is not None:
            return bool(self.event.query())
        work = self.work() if self.work is not None else None
        return self.has_begun and (work is None or bool(work.is_completed()))


class Watch:
    """Of one group. ``timeout``: seconds that its collectives may take."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._newest: Watched | None = None
        self._held: Watched | None = None
        self._has_spoken = False

    def see(self, one: Watched) -> None:
        """A collective is about to start."""
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

    def is_stuck(self) -> bool:
        """Whether the call that starts the collective has not returned by the timeout, so that nothing else ends it."""
        held = self._held
        return held is not None and not held.has_begun and time.monotonic() - held.started > self.timeout


_watches: WeakKeyDictionary[dist.ProcessGroup, Watch] = WeakKeyDictionary()
_lock = threading.Lock()
_threads: list[threading.Thread] = []


def watch(call: Call, device: torch.device) -> Watched:
    """A collective of tensors on ``device`` that is about to start; an eye is kept on it where nobody else says who is missing."""
    watched = Watched(call, time.monotonic())
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return watched
    with _lock:
        if call.group not in _watches:
            timeout = _timeout_of(call.group, device)
            if timeout is None:
                return watched
            _watches[call.group] = Watch(timeout)
        _watches[call.group].see(watched)
        if not _threads:
            _threads.append(threading.Thread(target=_keep_looking, name="magi_attention watch", daemon=True))
            _threads[0].start()
    return watched


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
            if one.is_stuck():
                logger.critical(
                    "giving up: NCCL has been connecting to its peers for the group's timeout, and ends by itself never"
                )
                os.abort()  # as its watchdog does where it can
        time.sleep(min([_MOST_SECONDS_BETWEEN_LOOKS, *(0.02 * one.timeout for one in watches)]))
