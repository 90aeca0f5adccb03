"""A folder that one run works in, and no other at the same time: their files would be mixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kadr.errors import MediaError, RequestError

LOCK_FILE = ".lock"  # the system lets go of it when the process ends, however it does


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, is this run's as long as the block runs.

    Raises:
        RequestError: another run works in it.
        MediaError: it cannot be made.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(
            f"another run works in {folder}. Wait until it has ended, or name another --output."
        ) from None
    except OSError as error:
        raise MediaError(
            f"the folder {folder} cannot be made or written: {error.strerror or error}. Give another --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


def remove_lock(folder: Path) -> None:
    """Take away the claim of a folder, and the folder where nothing else is in it; a link to one stays."""
    with suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()
