"""A worker: a process that makes the videos of jobs, one at a time, and says every second that it lives.

Its main thread makes; another one listens for cancelling, and a third one beats. Reports go to the supervisor through a
pipe, as (kind, data): "ready", "beat", "plan", "progress", "notice", then "done" or "failed". When the pipe closes, the
supervisor is gone, and the worker ends at once: its job is another's.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol

from kadr.cancellation import CancelToken
from kadr.errors import (
    Cancelled,
    CheckpointError,
    KadrError,
    MediaError,
    NonFiniteError,
    PlanError,
    RequestError,
)
from kadr.jobs.engine_maker import Report, Task
from kadr.jobs.folders import write_result
from kadr.jobs.job import CANCELLED, JobError
from kadr.kernels.cpu.malloc import tune_malloc

BEAT_SECONDS = 1.0
EXIT_SUPERVISOR_GONE = 3
_ERROR_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (Cancelled, CANCELLED),
    (RequestError, "invalid_request"),
    (MediaError, "invalid_media"),
    (PlanError, "out_of_memory"),
    (MemoryError, "out_of_memory"),
    (NonFiniteError, "non_finite"),
    (CheckpointError, "model_error"),
    (KadrError, "failed"),
)
DISK_FULL = "disk_full"


class Maker(Protocol):
    """Makes the videos of jobs in a worker; `EngineMaker` is the one."""

    @property
    def warm_engines(self) -> Collection[str]:
        """Canonical JSON of the engines that are in memory."""
        ...

    def make(self, task: Task, report: Report, token: CancelToken) -> dict[str, Any]:
        """Makes the video of a job and returns its result."""
        ...


MakerFactory = Callable[[], Maker]


class WorkerProcess:
    """A worker as its supervisor sees it.

    Args:
        create_maker: called in the worker; pickled, so a function or class of a module.
    """

    def __init__(self, create_maker: MakerFactory, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_worker, args=(theirs, create_maker), name=name, daemon=True)
        self._send_lock = Lock()
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, kind: str, data: Any = None) -> bool:
        """Sends a command: "make" with a `Task`, or "cancel" with a fence. Returns false if the worker is gone."""
        try:
            with self._send_lock:
                self._connection.send((kind, data))
            return True
        except OSError:
            return False

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        """Returns the next report, or None after `timeout` seconds.

        Raises:
            EOFError: the worker is gone.
        """
        try:
            return self._connection.recv() if self._connection.poll(timeout) else None
        except (EOFError, OSError) as error:
            raise EOFError from error

    def kill(self) -> None:
        """Ends the process at once, also one that is stopped, and waits until it is gone."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def describe_end(self) -> str:
        """Says how the process ended, once its pipe is closed."""
        self._process.join(timeout=5.0)
        code = self._process.exitcode
        if code is None:
            return "the worker closed its connection"
        return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"


def run_worker(connection: Connection, create_maker: MakerFactory) -> None:
    """Runs a worker until the pipe closes."""
    for name in ("SIGINT", "SIGHUP"):  # the terminal sends them to the supervisor too, which decides
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)
    tune_malloc()
    _Worker(connection, create_maker()).run()


@dataclass
class _Current:
    """The claim that is being made."""

    fence: int
    token: CancelToken


class _Worker:
    def __init__(self, connection: Connection, maker: Maker) -> None:
        self._connection, self._maker = connection, maker
        self._send_lock, self._current = Lock(), _Current(-1, CancelToken())
        self._tasks: SimpleQueue[Task] = SimpleQueue()

    def run(self) -> None:
        """Makes job after job."""
        for target in (self._listen, self._beat):
            Thread(target=target, daemon=True, name=f"kadr worker {target.__name__}").start()
        self._send("ready", list(self._maker.warm_engines))
        while True:
            self._make(self._tasks.get())

    def _make(self, task: Task) -> None:
        token = self._current.token
        try:
            result = self._maker.make(task, self._send, token)
            write_result(task.output, result)
            outcome: tuple[str, Any] = "done", result
        except BaseException as error:
            outcome = "failed", explain(error)
        self._send(outcome[0], {"outcome": outcome[1], "warm_engines": list(self._maker.warm_engines)})

    def _listen(self) -> None:
        while True:
            try:
                kind, data = self._connection.recv()
            except (EOFError, OSError):
                self._end()
            if kind == "make":
                self._current = _Current(data.fence, CancelToken())
                self._tasks.put(data)
            elif kind == "cancel" and data == self._current.fence:
                self._current.token.cancel()

    def _beat(self) -> None:
        while True:
            self._send("beat", None)
            time.sleep(BEAT_SECONDS)

    def _send(self, kind: str, data: Any) -> None:
        try:
            with self._send_lock:
                self._connection.send((kind, data))
        except OSError:
            self._end()

    def _end(self) -> None:
        self._current.token.remove_leftovers()
        os._exit(EXIT_SUPERVISOR_GONE)


def explain(error: BaseException) -> JobError:
    """Returns the error of a job for an exception of its maker."""
    for kind, code in _ERROR_CODES:
        if isinstance(error, kind):
            return JobError(code, str(error) or type(error).__name__)
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        reason = error.strerror or str(error)
        return JobError(DISK_FULL if is_full else "storage", f"the video cannot be written: {reason}.")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without loading torch
        return JobError("out_of_memory", "memory is full. Ask for a smaller size, or fewer frames.")
    return JobError("internal", f"unexpected {type(error).__name__}: {error}. This is a bug; please report it.")
