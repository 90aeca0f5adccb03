"""Errors and warnings as one line each on stderr, with the exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer

from kadr.cli.terminal.signals import CANCELLED, EXIT_CANCELLED
from kadr.errors import Cancelled, KadrError, KadrWarning
from kadr.kernels.error_kinds import is_out_of_memory
from kadr.quoting import MAX_LINE, MAX_QUOTED, one_line, show

MAX_ERROR_LINE = 499  # characters: a message and the "error: " before it
MAX_NUMBERS = 12  # of videos or rows, that a message lists
EXIT_ERROR = 1  # bad usage is 2, typer's own code
DEBUG_VARIABLE = "KADR_DEBUG"  # environment variable: any value but "" and 0 shows tracebacks


class _Voice:
    """The amount that a command says: it is one for the whole process, as stderr is."""

    is_quiet = False


def set_quiet(is_quiet: bool) -> None:
    """Keeps everything but errors from stderr, or no longer does."""
    _Voice.is_quiet = is_quiet


def is_quiet() -> bool:
    """Returns whether --quiet was given."""
    return _Voice.is_quiet


def print_stderr(line: str, *, limit: int = MAX_LINE) -> None:
    """Prints a message to stderr, escaped and cut to `limit` characters; stdout is for data. Nothing under --quiet.

    A message that cannot be printed is no reason to stop.
    """
    if not _Voice.is_quiet:
        _write_stderr(line, limit)


def _write_stderr(line: str, limit: int) -> None:
    with suppress(OSError):
        print(one_line(line, limit), file=sys.stderr)


def print_stdout(result: object, *, outcome: str = "") -> None:
    """Prints a result to stdout.

    Args:
        outcome: says in the error what is done in spite of it, as a sentence.

    Raises:
        KadrError: stdout cannot be written, as on a full disk.
        BrokenPipeError: whoever read stdout has closed it.
    """
    with writing_stdout(outcome):
        print(result, flush=True)


@contextmanager
def writing_stdout(outcome: str = "") -> Iterator[None]:
    """Explains where the block cannot write to stdout; arguments and errors as for `print_stdout`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise KadrError(f"{outcome} {explain_stdout_error(error)}".lstrip()) from error


def explain_stdout_error(error: OSError) -> str:
    """Returns the line about a stdout that cannot be written; nothing more is written to it when the process ends."""
    with suppress(OSError, ValueError):  # ValueError: it has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"stdout cannot be written: {error.strerror or error}. Redirect it to a place with room."


@contextmanager
def handle_errors() -> Iterator[None]:
    """Turns an exception of a verb into a line on stderr and an exit code, and each warning into a line."""
    with _print_warnings():
        try:
            _require_working_folder()
            yield
        except (typer.Exit, typer.BadParameter):
            raise
        except (KeyboardInterrupt, Cancelled) as error:
            raise _exit(error, CANCELLED, EXIT_CANCELLED) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of stdout has closed it: typer exits quietly
            raise _exit(error, f"error: {explain_error(error)}", EXIT_ERROR) from error


def _require_working_folder() -> None:
    """Refuses to run in a folder that was removed: libraries end the process there without a word.

    Raises:
        KadrError: it was.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise KadrError("the current folder was removed. Change to one that exists.") from error


def _exit(error: BaseException, message: str, code: int) -> typer.Exit:
    limit = MAX_ERROR_LINE if not isinstance(error, KadrError) else len(message)  # those are cut already
    print_error(error, message, limit=limit)
    return typer.Exit(code)


def print_error(error: BaseException, message: str, *, limit: int) -> None:
    """Prints the message about an exception, each line cut to `limit` characters, and its traceback if asked to."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    for line in message.split("\n"):
        _write_stderr(line, limit)


def explain_error(error: Exception) -> str:
    """Returns what went wrong, for the user; further lines are details."""
    if isinstance(error, KadrError):
        return str(error)
    if (message := _import_message(error)) is not None:
        return message
    return _os_error_message(error) if isinstance(error, OSError) else _unexpected_message(error)


def refuse_failures(failed: Sequence[int], total: int, noun: str, way_out: str) -> None:
    """Ends a command with an error if some of what it was to make failed, which it has reported one by one.

    Args:
        failed: the numbers of those.
        noun: for all of them, in the plural.

    Raises:
        KadrError: there are such; names the first of them.
    """
    if failed:
        listed, more = ", ".join(map(str, failed[:MAX_NUMBERS])), len(failed) - MAX_NUMBERS
        numbers = f"{listed} and {more} more" if more > 0 else listed
        raise KadrError(f"{len(failed)} of {total} {noun} failed: {numbers}. {way_out}")


def _os_error_message(error: OSError) -> str:
    """Says which file the system refused, and why."""
    if error.errno == errno.ENAMETOOLONG:
        return (
            f"the name {show(error.filename)} is too long for a file: most systems allow 255 bytes. Use a shorter one."
        )
    subject = "a file" if error.filename is None else show(error.filename, 2 * MAX_QUOTED)
    return f"{subject} cannot be used: {error.strerror or error}. Check the path, its permissions and the free space."


def _import_message(error: Exception) -> str | None:
    """Returns the line about a library that failed while it was imported; None for another error."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (frame.f_globals.get("__name__", "") for frame in frames if frame.f_code.co_name == "<module>")
    libraries = (str(name).partition(".")[0] for name in names)
    library = next((name for name in libraries if name not in ("kadr", "__main__", "")), None)
    if library is None:
        return None
    return (
        f"{library} cannot be imported: {_summary(error)}. Correct the environment variables that it reads, or "
        "install it again."
    )


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].strip(" :.")


def _unexpected_message(error: Exception) -> str:
    summary = _summary(error)
    if is_out_of_memory(error):
        return f"memory is full ({summary}). Ask for less: a smaller --size, or fewer --frames."
    return (
        f"unexpected {summary}\n"
        f"This is a bug. Please report it with your command and its output under {DEBUG_VARIABLE}=1."
    )


@contextmanager
def _print_warnings() -> Iterator[None]:
    """Prints kadr's warnings; prints others only if -W or PYTHONWARNINGS is set."""

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, KadrWarning):
            print_stderr(f"warning: {' '.join(str(message).split())}", limit=MAX_ERROR_LINE)
        else:
            original_showwarning(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", KadrWarning)
        original_showwarning, warnings.showwarning = warnings.showwarning, show
        yield
