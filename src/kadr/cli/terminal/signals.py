"""Signals: the first cancels the work, the second ends the process at once. Neither leaves half-written files.

Python runs signal handlers between the bytecodes of the main thread, which may be seconds apart when torch computes.
So a thread listens at the other end of `signal.set_wakeup_fd`, which receives each signal at the moment it comes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

from kadr.cancellation import CancelToken, use_token

EXIT_CANCELLED = 130
CANCELLING = "cancelling after this layer; once more ends at once"
CANCELLED = "cancelled"
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows has no SIGHUP, others have no SIGBREAK


@contextmanager
def handle_signals() -> Iterator[CancelToken]:
    """Cancels the work of the block at the first Ctrl-C, TERM or HUP, and ends the process with 130 at the second.

    While no work looks at the token, as during imports, the first signal ends the process. Ignored signals stay
    ignored, such as HUP under nohup. Call it in the main thread.

    Yields:
        The token, which is the current one of the block.
    """
    token = CancelToken()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.getsignal(number) for name in _SIGNALS if (number := getattr(signal, name, None))}
    previous = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    listener = Thread(target=_listen, args=(receiver, token, frozenset(previous)), name="kadr signals", daemon=True)
    listener.start()
    for number in previous:
        signal.signal(number, _leave_to_listener)
    try:
        with use_token(token):
            yield token
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        sender.close()
        listener.join()
        receiver.close()


def _leave_to_listener(number: int, frame: object) -> None:
    """Does nothing: a handler in Python makes the interpreter write the signal to the listener's socket."""


def _listen(receiver: socket.socket, token: CancelToken, numbers: frozenset[int]) -> None:
    """Acts on each signal, until the other end of the socket is closed."""
    while received := receiver.recv(1):
        if received[0] not in numbers:
            continue
        if token.is_cancelled or not token.is_in_use:
            _end_process(token)
        token.cancel()
        with suppress(OSError, ValueError):  # the terminal is gone
            print(CANCELLING, file=sys.stderr, flush=True)


def _end_process(token: CancelToken) -> None:
    """Ends the process without waiting for the main thread, which may be inside an operation of minutes."""
    try:
        token.remove_leftovers()
        with suppress(OSError, ValueError):  # the terminal is gone
            line = f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}{CANCELLED}\n"
            os.write(sys.stderr.fileno(), line.encode())
        token.remove_leftovers()  # once more: the main thread may have opened a file meanwhile
    finally:
        os._exit(EXIT_CANCELLED)
