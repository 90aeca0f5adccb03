"""Cancelling: work looks at a token before each layer, tensor, frame and file chunk, and raises `Cancelled`.

The token of the work that runs is in a context variable: functions deep inside need no argument for it, and threads
that work at the same time have one each. A thread that work starts has none unless it runs in a copy of the context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from kadr.errors import Cancelled

RemoveLeftover = Callable[[], object]


class CancelToken:
    """Cancels one piece of work, once and for all; make a new one for the next.

    Attributes:
        is_cancelled: read often, by the work.
        reason: message of the `Cancelled` that the work raises.
        queued_layers: events of the layers that a GPU has queued; see `kernels.cuda.run_ahead`.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self.reason = ""
        self.queued_layers: deque[Any] = deque()
        self._cancellable_blocks: list[None] = []  # one entry for each that runs; append and pop are atomic
        self._leftovers: list[RemoveLeftover] = []

    def cancel(self, reason: str = "") -> None:
        """Asks the work to stop. Only sets a flag: any thread and any signal handler may call it, any number of times.

        Args:
            reason: message of the `Cancelled`; the first call decides.
        """
        if not self.is_cancelled:
            self.reason = reason
            self.is_cancelled = True

    def check(self) -> None:
        """Raises: Cancelled: `cancel` was called."""
        if self.is_cancelled:
            raise Cancelled(self.reason or "cancelled")

    @property
    def is_in_use(self) -> bool:
        """True while a `cancellable` block runs: only then does anything look at the token."""
        return bool(self._cancellable_blocks)

    def remove_leftovers(self) -> None:
        """Removes half-written files, for a process that ends at once; see `remove_if_ended`."""
        for remove in reversed(self._leftovers.copy()):
            with suppress(OSError):
                remove()


_current_token: ContextVar[CancelToken | None] = ContextVar("kadr cancel token", default=None)


def current_token() -> CancelToken | None:
    """Returns the token of the work that runs in this context."""
    return _current_token.get()


def check_cancelled() -> None:
    """Raises `Cancelled` if the work that runs is cancelled. Takes a tenth of a microsecond.

    Call it outside of compiled functions and CUDA graph captures.

    Raises:
        Cancelled: the current token is cancelled.
    """
    token = _current_token.get()
    if token is not None and token.is_cancelled:
        token.check()


@contextmanager
def use_token(token: CancelToken | None) -> Iterator[None]:
    """Makes a token the current one of the block; None: nothing in the block is cancelled."""
    previous = _current_token.set(token)
    try:
        yield
    finally:
        _current_token.reset(previous)


@contextmanager
def cancellable(token: CancelToken | None = None) -> Iterator[CancelToken]:
    """Runs work that looks at its token often, and yields the token.

    Args:
        token: None takes the current one, or makes one where there is none.

    Raises:
        Cancelled: the token is cancelled, already or while the block runs.
    """
    token = token or _current_token.get() or CancelToken()
    with use_token(token):
        token._cancellable_blocks.append(None)
        try:
            token.check()
            yield token
        finally:
            token._cancellable_blocks.pop()


@contextmanager
def uninterruptible_wait() -> Iterator[None]:
    """Runs a wait that cannot look at the token, such as one for the network: `is_in_use` is false meanwhile.

    The command line then ends the process at the first signal instead of the second.
    """
    token = _current_token.get()
    if token is None:
        yield
        return
    blocks, token._cancellable_blocks = token._cancellable_blocks, []
    try:
        yield
    finally:
        token._cancellable_blocks = blocks


@contextmanager
def remove_if_ended(remove: RemoveLeftover) -> Iterator[None]:
    """Has `remove` called if the process ends at once, by `CancelToken.remove_leftovers`, while the block runs.

    Args:
        remove: deletes what an interrupted block leaves behind; that may not be there yet, or no longer.
    """
    token = _current_token.get()
    if token is None:
        yield
        return
    token._leftovers.append(remove)
    try:
        yield
    finally:
        token._leftovers.remove(remove)
