"""`MediaProcess`: opens files of clients in a process of its own: a hostile file can harm nothing else there."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Semaphore, to_thread

from kadr.errors import MediaError

MEMORY_BYTES = 3 << 30  # of address space; an image of 100 million pixels takes 1.1 GB, a clip of 8192x8192 0.8 GB
RETRY_SECONDS = 5
UNREADABLE = "the file cannot be read: it is damaged."
_RESULT, _ERROR = b"=", b"!"  # first byte of an answer

Read = Callable[..., bytes]  # (path, *arguments) -> the answer; a function of a module


class MediaProcess:
    """Calls a function on files of clients in another process, one file at a time. Threads may share it.

    Args:
        read: the function.
        seconds: that it has for a file.
        max_bytes: of its answer.
        too_slow: the message where it takes longer.
    """

    def __init__(self, read: Read, *, seconds: float, max_bytes: int, too_slow: str = UNREADABLE) -> None:
        self._read, self._seconds, self._max_bytes, self._too_slow = read, seconds, max_bytes, too_slow
        self._lock = Lock()
        self._turns = CapacityLimiter(1)  # those that wait take none of the threads that all routes share
        self._turns_of: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()  # one of each client waits for them
        self._process: Any = None
        self._connection: Connection | None = None

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    async def _take_turn(self, owner: str, ask: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `ask` in a thread. owner: whose file it is: clients take turns, however many files one has."""
        turn = self._turns_of.get(owner)
        if turn is None:
            turn = self._turns_of[owner] = Semaphore(1)
        async with turn:
            return await to_thread.run_sync(ask, *arguments, limiter=self._turns)

    def _ask(self, path: Path, *arguments: Any, parse: Callable[[bytes], Any]) -> Any:
        """Returns the parsed answer of the function.

        Args:
            parse: raises ValueError, TypeError or KeyError where the answer cannot be true. It must not trust it: a
                file that took over that process must not take over this one.

        Raises:
            MediaError: as the function; or the file stopped the process, or took too long.
            ApiError: the process cannot be started.
        """
        with self._lock:
            connection, is_late = self._connection or self._start(), Event()
            timer = Timer(self._seconds, _kill, (self._process, is_late))
            timer.daemon = True
            timer.start()
            try:
                connection.send((path, arguments))
                answer = connection.recv_bytes(self._max_bytes)
                if answer[:1] == _RESULT:
                    return parse(answer[1:])
                if answer[:1] != _ERROR:
                    raise ValueError("this is no answer")
                message = answer[1:].decode()
            except (EOFError, OSError, ValueError, TypeError, KeyError) as error:
                self._stop()
                raise MediaError(self._too_slow if is_late.is_set() else UNREADABLE) from error
            finally:
                timer.cancel()
                timer.join()
                if is_late.is_set():
                    self._stop()
        raise MediaError(message.replace(str(path), "the file"))

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, self._read), name="kadr media", daemon=True)
        try:
            process.start()
        except OSError as error:
            connection.close()
            from kadr.server.errors import ApiError  # the process that looks at media does without its libraries

            message = "the server cannot look at media now: it has too little memory. Try again later."
            raise ApiError(503, message, code="busy", headers={"retry-after": str(RETRY_SECONDS)}) from error
        finally:
            theirs.close()
        self._connection, self._process = connection, process
        return connection

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._connection = self._process = None


def _kill(process: Any, is_late: Event) -> None:
    is_late.set()
    process.kill()


def _run(connection: Connection, read: Read) -> None:
    """Reads file after file, until the pipe closes."""
    _limit_resources()
    while True:
        try:
            path, arguments = connection.recv()
        except (EOFError, OSError):
            return
        connection.send_bytes(_answer(read, path, arguments))


def _answer(read: Read, path: Path, arguments: tuple[Any, ...]) -> bytes:
    try:
        return _RESULT + read(path, *arguments)
    except MediaError as error:
        return _ERROR + str(error).encode()
    except Exception as error:  # of a library, for a file that nobody thought of
        return _ERROR + f"the file cannot be read: {type(error).__name__}.".encode()


def _limit_resources() -> None:
    """Bounds the memory of this process, and lets it write to no file."""
    if sys.platform.startswith("linux"):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
