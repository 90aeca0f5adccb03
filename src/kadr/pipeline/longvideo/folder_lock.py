"""Lock on a folder: only one process at a time writes into it, so that no files are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kadr.errors import MediaError, RequestError
from kadr.file_names import CAN_DELETE_OPEN_FILES

LOCK_FILE = ".lock"  # the system releases the lock when the process ends, however it ends


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Creates the folder if absent, and locks it for this process while the block runs.

    Raises:
        RequestError: another process has locked the folder.
        MediaError: the folder cannot be created or written.
    """
    lock = FileLock(folder / LOCK_FILE)
    _acquire_lock(lock, folder)
    try:
        yield
    finally:
        # Deleted while it is held: a process that opened it meanwhile finds it deleted, and takes no lock.
        if CAN_DELETE_OPEN_FILES:
            remove_lock(folder)
        lock.release()
        if not CAN_DELETE_OPEN_FILES:
            remove_lock(folder)


def _acquire_lock(lock: FileLock, folder: Path) -> None:
    """Creates the folder if absent, and acquires its lock without waiting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(
            f"another process is writing to {folder}. Wait until it ends, or choose another --output."
        ) from None
    except OSError as error:
        raise MediaError(
            f"the folder {folder} cannot be created or written: {error.strerror or error}. Choose another --output."
        ) from error


def remove_lock(folder: Path) -> None:
    """Deletes the lock of a folder, and the folder itself if it is empty; a symbolic link to a folder stays."""
    with suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()
