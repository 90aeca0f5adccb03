"""What goes wrong, told in one line on stderr, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from kadr.errors import Cancelled, KadrError, KadrWarning

EXPLAINED, CANCELLED = 1, 130  # bad usage is 2, and typer's own
DEBUG = "KADR_DEBUG"  # in the environment: anything but nothing or 0 shows tracebacks


def say(line: str) -> None:
    """Talk."""
    print(line, file=sys.stderr)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what a verb raises into a line on stderr and an exit code, and warnings into a line each."""
    with _warnings_in_one_line():
        try:
            yield
        except (typer.Exit, typer.BadParameter):
            raise
        except (KeyboardInterrupt, Cancelled) as error:
            raise _ended(error, "cancelled", CANCELLED) from error
        except KadrError as error:
            raise _ended(error, f"error: {error}", EXPLAINED) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of stdout has gone: typer ends quietly
            raise _ended(error, _unexpected(error), EXPLAINED) from error


def _ended(error: BaseException, line: str, code: int) -> typer.Exit:
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    say(line)
    return typer.Exit(code)


def _unexpected(error: Exception) -> str:
    told = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without loading torch
        return f"error: the memory is full ({told}). Ask for less: a smaller --size, or fewer --frames."
    return (
        f"error: kadr did not expect this: {told}\n"
        f"It is a bug. Please report it, with your command and what it prints when {DEBUG}=1 is set in the environment."
    )


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show kadr's own warnings, and nobody else's unless Python was asked to (-W, PYTHONWARNINGS)."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, KadrWarning):
            say(f"warning: {' '.join(str(message).split())}")
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", KadrWarning)
        usual, warnings.showwarning = warnings.showwarning, show
        yield
