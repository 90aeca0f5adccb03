"""Writes files and folders so that their names never stand for something incomplete: beside first, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from kadr.cancellation import remove_if_ended
from kadr.errors import CheckpointError
from kadr.file_names import replace_file
from kadr.validation import MAX_NAME_BYTES


def write_json(path: Path, content: Mapping[str, Any], *, fsync: bool = False) -> None:
    """Writes a JSON object to a file, atomically. fsync: see `atomic_file`."""
    with atomic_file(path, fsync=fsync) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


@contextmanager
def atomic_file(path: Path, *, fsync: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name only when it is complete; errors as `atomic_path`.

    Args:
        fsync: wait until the file is on disk, so that a power cut leaves the new file or the old one.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file
        if fsync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path, renamed to `path` when the block succeeds and deleted when it fails.

    It is also deleted when the process ends at once; see `cancellation.remove_if_ended`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = _temporary_path(path)
    with _write_beside(path, remove=partial(temporary.unlink, missing_ok=True)):
        yield temporary
        replace_file(temporary, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to `path` when the block succeeds and deleted when it fails.

    A folder that is at `path` is replaced. See also `atomic_path`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    temporary = _temporary_path(path)
    with _write_beside(path, remove=partial(shutil.rmtree, temporary, ignore_errors=True)):
        temporary.mkdir()
        yield temporary
        _replace_folder(temporary, path)


@contextmanager
def _write_beside(path: Path, *, remove: Callable[[], object]) -> Iterator[None]:
    """Explains where the block cannot write what will be at `path`; removes what is left of it, also if it fails."""
    with remove_if_ended(remove):
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{path} cannot be written: {reason}. Write it elsewhere.") from error
        finally:
            remove()


def _temporary_path(path: Path) -> Path:
    """Returns a hidden path beside `path`, of this process; its name is short enough for any that `path` may have."""
    end, name = f".{os.getpid()}.part", path.name
    if len(os.fsencode(name)) + len(end) >= MAX_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}{end}")


def _replace_folder(new: Path, path: Path) -> None:
    """Renames a folder to a path; no system replaces a folder that is not empty, so an older one steps aside first."""
    if not os.path.lexists(path):
        new.rename(path)
        return
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk; Windows has no such call, and writes them itself.

    Raises:
        OSError: the folder cannot be read.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
