"""Run a function on several ranks of this machine (gloo, CPU) and bring back what each returned, or each one's error whole.

    caller                      worker of rank r (a process, kept for the next call)
    run(fn, *args) ── job ────► make a fresh process group, seed, fn(*args)
                  ◄── reply ──  its result, or its traceback

Nothing here waits without a limit: a rank that is silent past its time is asked for its stack and then killed. Processes are forked from
a server that has imported torch once, so that a rank starts in hundredths of a second where importing torch takes seconds.
"""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from typing_extensions import Self

# After one rank failed, how long the others may go on: most fail at once because their peer is gone, and their errors matter too.
SECONDS_AFTER_A_FAILURE = 3.0


class RankError(RuntimeError):
    """Some ranks failed. ``tracebacks``: what each of them has to say, by rank, the first that failed first."""

    def __init__(self, name: str, num_ranks: int, tracebacks: dict[int, str]) -> None:
        self.tracebacks = tracebacks
        parts = [f"{name} failed on rank(s) {', '.join(map(str, tracebacks))} of {num_ranks}; the first is shown first"]
        parts += [f"--- rank {rank} ---\n{text.rstrip()}" for rank, text in tracebacks.items()]
        super().__init__("\n".join(parts))


@dataclass(frozen=True)
class _Job:
    """``payload``: the pickled ``(fn, args)``, apart, so that a function that cannot be imported is that rank's error."""

    payload: bytes
    rank: int
    num_ranks: int
    store: str
    group_timeout: float
    threads: int
    sys_path: list[str]
    environ: dict[str, str]


@dataclass(frozen=True)
class _Worker:
    process: Any  # multiprocessing's process types share no public base class with a sentinel
    connection: Connection
    log: Path


class RankPool:
    """Processes that serve as ranks, started on the first run and kept until `close` or until a run fails.

    Every run has a process group, random seed, environment (the caller's) and number of threads of its own; a failure ends all the
    processes, and the next run starts others.

    Args:
        num_ranks: ranks of a run that does not say otherwise.
        threads: of torch in each rank.
        timeout: seconds that a run may take.
    """

    def __init__(self, num_ranks: int, *, threads: int = 1, timeout: float = 120.0) -> None:
        self.num_ranks, self.threads, self.timeout = num_ranks, threads, timeout
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_jobs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        num_ranks: int | None = None,
        timeout: float | None = None,
        group_timeout: float | None = None,
    ) -> list[Any]:
        """``fn(*args)`` on every rank, where ``torch.distributed`` is initialised with gloo.

        Args:
            fn: defined at the top of a module that the ranks can import; ``dist.get_rank()`` says which rank it is.
            args: pickled, the same for all.
            num_ranks: left out, the pool's.
            timeout: seconds for the whole run; left out, the pool's.
            group_timeout: seconds that a collective may take, left out as ``timeout``.

        Returns:
            What ``fn`` returned, by rank.

        Raises:
            RankError: with the traceback of every rank that raised, died, or did not finish.
            ValueError: ``fn`` or ``args`` cannot be sent to another process.
        """
        num_ranks = self.num_ranks if num_ranks is None else num_ranks
        timeout = self.timeout if timeout is None else timeout
        payload = _pack(fn, args)
        try:
            self._start(num_ranks)
            assert self._folder is not None
            store = str(Path(self._folder.name) / f"store-{self._num_jobs}")
            self._num_jobs += 1
            group_timeout = timeout if group_timeout is None else group_timeout
            for rank, worker in enumerate(self._workers[:num_ranks]):
                job = _Job(
                    payload, rank, num_ranks, store, group_timeout, self.threads, list(sys.path), dict(os.environ)
                )
                worker.connection.send_bytes(pickle.dumps(job))
            results, tracebacks = _collect(self._workers[:num_ranks], timeout)
        except BaseException:
            self.close()
            raise
        if tracebacks:
            self.close()
            raise RankError(getattr(fn, "__qualname__", repr(fn)), num_ranks, tracebacks)
        return [results[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker ends by itself when its connection does
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self, num_ranks: int) -> None:
        """Have at least ``num_ranks`` workers."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = _context()
        while len(self._workers) < num_ranks:
            here, there = context.Pipe()
            log = Path(self._folder.name) / f"log-{len(self._workers)}"
            # A daemon, so that the interpreter ends it rather than waits for it.
            process = context.Process(target=_serve, args=(there, str(log)), daemon=True)
            process.start()
            there.close()
            self._workers.append(_Worker(process, here, log))


def run_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 120.0,
    threads: int = 1,
    group_timeout: float | None = None,
) -> list[Any]:
    """``fn(*args)`` once on ``num_ranks`` new processes; see `RankPool.run`. A script calls it under ``if __name__ == "__main__"``."""
    with RankPool(num_ranks, threads=threads, timeout=timeout) as pool:
        return pool.run(fn, *args, group_timeout=group_timeout)


_shared: list[RankPool] = []


def shared_pool() -> RankPool:
    """One pool for all the tests of this process, with 4 ranks unless a run says otherwise; closed at exit."""
    if not _shared:
        _shared.append(RankPool(4))
        atexit.register(_shared[0].close)
    return _shared[0]


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # What every rank would import for itself: torch, and under pytest the main module and what torch.testing.assert_close imports late.
    under_test = ["pytest", "torch.distributed.tensor"] if "pytest" in sys.modules else []
    context.set_forkserver_preload(["torch", __name__, *under_test])
    return context


def _pack(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{fn!r} and its arguments must reach another process by pickle, which says: {error}. Define the function at the top "
            "of a module, and pass plain values or tensors"
        ) from error


def _collect(workers: list[_Worker], timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    """``(results, tracebacks)`` by rank; every rank is in one of them."""
    results: dict[int, Any] = {}
    tracebacks: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    why = f"did not finish within {timeout:g} s"
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(deadline - time.monotonic(), 0.0))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, reply = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                succeeded, reply = False, _last_words(workers[rank])
            (results if succeeded else tracebacks)[rank] = reply
            if not succeeded and len(tracebacks) == 1:
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
                why = f"did not finish within {SECONDS_AFTER_A_FAILURE:g} s after rank {rank} failed"
        if not ready:
            for rank in waiting.values():
                tracebacks[rank] = f"{why}; it was here:\n{_stack_of(workers[rank])}"
            break
    return results, tracebacks


def _last_words(worker: _Worker) -> str:
    worker.process.join(SECONDS_AFTER_A_FAILURE)
    code = worker.process.exitcode
    cause = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return f"the process ended {cause} before it answered\n{_read(worker.log)}"


def _stack_of(worker: _Worker) -> str:
    """The Python stack of a process that does not answer, written by its fault handler."""
    if not hasattr(signal, "SIGUSR1") or not worker.process.is_alive():
        return "(no stack: the process cannot be asked)"
    before = _read(worker.log)
    os.kill(worker.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if len(text := _read(worker.log)) > len(before):
            time.sleep(0.05)  # the rest of it
            return _read(worker.log)[len(before) :] or text
    return "(no stack: the process did not answer the signal)"


def _read(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def _serve(connection: Connection, log: str) -> None:
    """The life of a worker: jobs until one fails or the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who then kills
    written = open(log, "w")  # noqa: SIM115 - the fault handler writes to it for as long as the process lives
    faulthandler.enable(written)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=written, all_threads=False)
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while True:
        succeeded, reply = _carry_out(jobs.get())
        connection.send_bytes(pickle.dumps((succeeded, reply)))
        if not succeeded:
            # Without finalisers, which may wait for peers: peers must learn at once that this rank is gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def _receive(connection: Connection, jobs: queue.SimpleQueue[_Job]) -> None:
    """Jobs into the queue; a caller that is gone ends the process, whatever its main thread waits for."""
    while True:
        try:
            jobs.put(pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(1)


def _carry_out(job: _Job) -> tuple[bool, Any]:
    """``(True, result)`` or ``(False, traceback)``."""
    try:
        sys.path[:] = job.sys_path
        os.environ.clear()
        os.environ.update(job.environ)
        _begin(job)
        fn, args = pickle.loads(job.payload)
        result = fn(*args)
        pickle.dumps(result)
    except BaseException:
        return False, traceback.format_exc()
    return True, result


def _begin(job: _Job) -> None:
    """A fresh process group, and torch as a new process has it.

    The last job's group is given up only here: by now all its ranks have answered, so none loses a peer that it still talks to.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(job.threads)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if (
        torch.are_deterministic_algorithms_enabled()
    ):  # only then, for the call imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    if sys.platform == "linux":
        # Ranks of one machine; looking up the host's name fails or takes seconds where it has no address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.store}",  # not a port: another process may take a free one first
        rank=job.rank,
        world_size=job.num_ranks,
        timeout=datetime.timedelta(seconds=job.group_timeout),
    )
    _meet(job)


def _meet(job: _Job) -> None:
    """Wait until every rank has connected to all: one that fails at once would else fail the others before they begin."""
    store = dist.FileStore(f"{job.store}-met", job.num_ranks)
    if store.add("connected", 1) == job.num_ranks:
        store.set("all", "connected")
    store.wait(["all"], datetime.timedelta(seconds=job.group_timeout))
