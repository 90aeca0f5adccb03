"""Moves the finished video of a job into the folder of a batch, under a name that nothing else has.

The name is on disk before the video has it: whenever the process ends, the next one knows which file is the job's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kadr.atomic_write import sync_folder, write_json
from kadr.errors import CheckpointError
from kadr.file_names import replace_file
from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.jobs.folders import OUTPUT_FOLDER
from kadr.json_reader import parse_json
from kadr.regular_file import read_text

_RECORD = "published.json"  # in the job's folder: the name of the file


def find_published(job_folder: Path) -> str | None:
    """Returns the name of a job's video, if it has been moved; None otherwise."""
    return None if _unpublished(job_folder).exists() else _read_record(job_folder)


def is_unpublished(job_folder: Path) -> bool:
    """Tells whether the finished video of a job has yet to be moved."""
    return _unpublished(job_folder).exists()


def publish(job_folder: Path, folder: Path, name: str, another_name: Callable[[str], str]) -> str:
    """Moves the finished video of a job into a folder, and returns its name there; goes on where a crash broke off.

    Args:
        name: of the file. What has that name already is not replaced.
        another_name: returns a name that is free instead of one that is not.

    Raises:
        CheckpointError: the folder cannot be written. The video stays where it is, and this may be tried again.
    """
    video = _unpublished(job_folder)
    try:
        name = _reserve(job_folder, folder, _read_record(job_folder) or name, another_name)
        replace_file(video, folder / name)
        sync_folder(folder)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{folder / name} cannot be written: {reason}. The video lies in {video} until the batch runs again."
        ) from error
    return name


def _reserve(job_folder: Path, folder: Path, name: str, another_name: Callable[[str], str]) -> str:
    """Makes an empty file with a name that is free, and returns that; an empty file that is ours is there already."""
    while True:
        if _read_record(job_folder) == name and _is_empty(folder / name):
            return name
        write_json(job_folder / _RECORD, {"file": name}, fsync=True)
        try:
            with open(folder / name, "xb"):
                return name
        except FileExistsError:
            name = another_name(name)


def _unpublished(job_folder: Path) -> Path:
    return job_folder / OUTPUT_FOLDER / VIDEO_FILE


def _is_empty(path: Path) -> bool:
    return path.is_file() and os.path.getsize(path) == 0


def _read_record(job_folder: Path) -> str | None:
    try:
        name = parse_json(read_text(job_folder / _RECORD)).get("file")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None
