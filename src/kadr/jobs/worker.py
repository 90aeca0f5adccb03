"""A worker: a process that makes the videos of jobs, one at a time, and says every second that it lives.

Its main thread makes; another one listens for cancelling, and a third one beats. Reports go to the supervisor through a
pipe, as (kind, data): "ready", "beat", "start", "load", "plan", "progress", "preview", "notice", then "done" or
"failed". When the pipe closes, the supervisor is gone, and the worker ends at once: its job is another's.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
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
from kadr.jobs.job import CANCELLED, DISK_FULL, STORAGE, JobError
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.kernels.error_kinds import is_out_of_memory
from kadr.memory.allocator import use_expandable_segments

BEAT_SECONDS = 1.0
EXIT_SUPERVISOR_GONE = 3
KILL_SECONDS = 10.0  # to wait for a process that was killed; one that waits for a driver may outlive it
_PR_SET_PDEATHSIG = 1  # of prctl
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
INVALID_MEDIA, MODEL_ERROR = "invalid_media", "model_error"
_ERROR_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (Cancelled, CANCELLED),
    (RequestError, "invalid_request"),
    (MediaError, INVALID_MEDIA),
    (PlanError, "out_of_memory"),
    (MemoryError, "out_of_memory"),
    (NonFiniteError, "non_finite"),
    (CheckpointError, MODEL_ERROR),
    (KadrError, "failed"),
)


class Maker(Protocol):
    """Makes the videos of jobs in a worker; `EngineMaker` is the one."""

    @property
    def warm_engines(self) -> Collection[str]:
        """Canonical JSON of the engines that are in memory."""
        ...

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that this process takes, and that its next job can have."""
        ...

    def make(self, task: Task, report: Report, token: CancelToken) -> dict[str, Any]:
        """Makes the video of a job and returns its result."""
        ...


MakerFactory = Callable[[], Maker]


class WorkerProcess:
    """A worker as its supervisor sees it.

    Two threads read and write the pipe, so that nobody waits for a worker that is stopped, however long a message is.

    Args:
        create_maker: called in the worker; pickled, so a function or class of a module.

    Raises:
        OSError: the system starts no more processes.
    """

    def __init__(self, create_maker: MakerFactory, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_worker, args=(theirs, create_maker), name=name, daemon=True)
        self._commands: SimpleQueue[tuple[str, Any] | None] = SimpleQueue()
        self._reports: SimpleQueue[tuple[str, Any] | None] = SimpleQueue()  # None: the worker is gone
        try:
            self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()
        atexit.register(self._process.kill)  # it ignores the signal that multiprocessing sends, and waits after
        targets = (self._write_commands, self._read_reports)
        self._threads = [Thread(target=target, name=f"{name} pipe", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, kind: str, data: Any = None) -> None:
        """Sends a command, and does not wait: "make" with a `Task`, or "cancel" with a fence."""
        self._commands.put((kind, data))

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        """Returns the next report, or None after `timeout` seconds.

        Raises:
            EOFError: the worker is gone.
        """
        try:
            report = self._reports.get(timeout=timeout)
        except Empty:
            return None
        if report is None:
            self._reports.put(None)
            raise EOFError
        return report

    def kill(self) -> bool:
        """Ends the process at once, also one that is stopped. Returns false if it is still there after 10 seconds."""
        atexit.unregister(self._process.kill)
        self._process.kill()
        self._process.join(KILL_SECONDS)
        self._commands.put(None)
        for thread in self._threads:
            thread.join(1.0)
        if not any(thread.is_alive() for thread in self._threads):
            self._connection.close()
        return self._process.exitcode is not None

    def _write_commands(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                self._connection.send(command)
            except OSError:
                return  # the worker is gone, which `receive` says

    def _read_reports(self) -> None:
        try:
            while True:
                self._reports.put(self._connection.recv())
        except Exception:  # the worker is gone, or died while it wrote
            self._reports.put(None)

    def describe_end(self) -> str:
        """Says how the process ended, once its pipe is closed."""
        self._process.join(timeout=5.0)
        code = self._process.exitcode
        if code is None:
            return "the worker closed its connection"
        return f"the worker was killed by signal {-code}" if code < 0 else f"the worker ended with exit code {code}"


def run_worker(connection: Connection, create_maker: MakerFactory) -> None:
    """Runs a worker until the pipe closes."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they reach all processes of a terminal or service: the supervisor
        if (number := getattr(signal, name, None)) is not None:  # decides; Windows lacks the last
            signal.signal(number, signal.SIG_IGN)
    _wake_when_parent_dies()
    tune_malloc()
    use_expandable_segments()
    _Worker(connection).run(create_maker)


def _wake_when_parent_dies() -> None:
    """Has Linux continue this process if it is stopped when its supervisor dies, so that it sees the pipe close."""
    if sys.platform == "linux" and (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


@dataclass
class _Current:
    """The claim that is being made."""

    fence: int
    token: CancelToken


class _Worker:
    def __init__(self, connection: Connection) -> None:
        self._connection, self._send_lock = connection, Lock()
        self._current = _Current(-1, CancelToken())
        self._maker: Maker | None = None
        self._tasks: SimpleQueue[Task] = SimpleQueue()

    def run(self, create_maker: MakerFactory) -> None:
        """Makes job after job."""
        for target in (self._listen, self._beat):  # before the maker, which may take long
            Thread(target=target, daemon=True, name=f"kadr worker {target.__name__}").start()
        maker = self._maker = create_maker()
        self._send("ready", list(maker.warm_engines))
        while True:
            self._make(maker, self._tasks.get())

    def _make(self, maker: Maker, task: Task) -> None:
        token = self._current.token
        self._send("start", task.fence)
        try:
            result = maker.make(task, self._send, token)
            write_result(task.output, result)
            outcome: tuple[str, Any] = "done", result
        except BaseException as error:
            outcome = "failed", explain(error)
        self._send(outcome[0], {"outcome": outcome[1], "warm_engines": list(maker.warm_engines)})

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
            self._send("beat", 0 if self._maker is None else self._maker.device_bytes)
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
    system_error = _system_error(error)
    if system_error is not None and system_error.errno in _FULL:
        return JobError(DISK_FULL, _describe(error))
    if system_error is not None and system_error.errno == errno.EROFS:
        return JobError(STORAGE, _describe(error))
    for kind, code in _ERROR_CODES:
        if isinstance(error, kind):
            return JobError(code, str(error) or type(error).__name__)
    if isinstance(error, OSError):
        return JobError(STORAGE, _describe(error))
    if is_out_of_memory(error):
        return JobError("out_of_memory", "memory is full. Ask for a smaller size, or fewer frames.")
    return JobError("internal", f"unexpected {type(error).__name__}: {error}. This is a bug; please report it.")


def _system_error(error: BaseException | None) -> OSError | None:
    """Returns the error of the system that an exception explains, if any."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error


def _describe(error: BaseException) -> str:
    """Returns a line on what could not be written."""
    if isinstance(error, OSError):
        return f"the video cannot be written: {error.strerror or error}."
    return str(error)
