"""Reserves the name of an output file from the moment it is chosen until the file is written.

A lock beside the file is the reservation. The system releases it when the process ends, however it ends, and what is
left of a killed one is an empty hidden file, which the next process that reserves the name removes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kadr.cancellation import remove_if_ended
from kadr.errors import MediaError, RequestError
from kadr.file_names import CAN_DELETE_OPEN_FILES

_NAME_DIGITS = 12  # of the file's name in that of its lock, which a long name would make too long
_SHARED_MODE = 0o666  # processes of other users must be able to lock the file too


class Reservation:
    """The reservation of one name, for this process. Threads of a process are told apart too.

    Args:
        path: of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        digest = hashlib.sha256(os.path.normcase(path.name).encode(errors="surrogateescape")).hexdigest()
        self.path, self._lock_path = path, path.with_name(f".kadr-{digest[:_NAME_DIGITS]}.lock")
        self._lock = FileLock(self._lock_path, mode=_SHARED_MODE)

    def acquire(self) -> bool:
        """Reserves the name, without waiting. Returns false if it is reserved already.

        Raises:
            MediaError: the folder does not exist, or cannot be written.
        """
        folder = self.path.parent
        if not folder.is_dir():  # the lock would create it
            raise MediaError(f"the folder {folder} does not exist. Make it first, or choose another.")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            reason = error.strerror or error
            raise MediaError(f"the folder {folder} cannot be written: {reason}. Choose another.") from error
        return True

    def release(self) -> None:
        """Gives the name back, and removes the lock."""
        # Removed while it is locked: a process that opened it meanwhile finds it removed, and takes no lock. Windows
        # refuses to remove an open file, so there it is removed afterwards, unless another process has opened it.
        if CAN_DELETE_OPEN_FILES:
            self.remove_lock()
        self._lock.release()
        if not CAN_DELETE_OPEN_FILES:
            self.remove_lock()

    def remove_lock(self) -> None:
        """Removes the lock file."""
        with suppress(OSError):
            self._lock_path.unlink(missing_ok=True)


@contextmanager
def reserve_file(path: Path, *, flag: str) -> Iterator[None]:
    """Reserves the name of a file while the block runs.

    Args:
        flag: that names another file, for the error.

    Raises:
        RequestError: another process has reserved it.
        MediaError: as `Reservation.acquire`.
    """
    reservation = Reservation(path)
    if not reservation.acquire():
        raise RequestError(f"another process is writing {path}. Wait until it ends, or choose another {flag}.")
    with release_at_end(reservation):
        yield


@contextmanager
def release_at_end(reservation: Reservation) -> Iterator[None]:
    """Releases an acquired reservation when the block ends, or the process at once."""
    with remove_if_ended(reservation.remove_lock):
        try:
            yield
        finally:
            reservation.release()
