"""Folders of jobs: the media of each, and what its workers made.

jobs/video_.../job.json         the job as it was submitted
               media/           images and clips of its request
               output.3/        what the worker with fence 3 makes
               output/          the result: output.N, renamed when it was complete and on disk
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.atomic_write import sync_folder, write_json
from kadr.errors import CheckpointError
from kadr.file_names import replace_file
from kadr.jobs.job import StorageError, is_job_id
from kadr.json_reader import parse_json
from kadr.regular_file import read_text

RESULT_FILE, JOB_FILE = "result.json", "job.json"
OUTPUT_FOLDER, MEDIA_FOLDER = "output", "media"
_ATTEMPT = re.compile(rf"{OUTPUT_FOLDER}\.(\d+)")


@dataclass(frozen=True)
class JobFolders:
    """The folders of all jobs of a queue. root: made where it is missing."""

    root: Path

    def path(self, job_id: str) -> Path:
        """Returns the folder of a job.

        Raises:
            ValueError: the text is not an id, and might be any path.
        """
        if not is_job_id(job_id):
            raise ValueError(f"{job_id!r} is not the id of a job")
        return self.root / job_id

    def output(self, job_id: str) -> Path:
        """Returns the folder with the result of a completed job."""
        return self.path(job_id) / OUTPUT_FOLDER

    def attempt(self, job_id: str, fence: int) -> Path:
        """Returns the folder that the worker with this fence writes into."""
        return self.path(job_id) / f"{OUTPUT_FOLDER}.{fence}"

    def create(self, job_id: str, submitted: Mapping[str, Any]) -> Path:
        """Makes the folder of a new job, with what was submitted, from which a lost database is restored.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        folder = self.path(job_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / JOB_FILE, submitted)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise storage_error(folder, error) from error
        return folder

    def read_submitted(self, job_id: str) -> dict[str, Any] | None:
        """Returns what was submitted, or None where it cannot be read."""
        return _read_object(self.path(job_id) / JOB_FILE)

    def publish(self, job_id: str, fence: int) -> None:
        """Makes the complete folder of an attempt the result. Does nothing where that has happened.

        Raises:
            StorageError: the folder cannot be written.
        """
        attempt, output = self.attempt(job_id, fence), self.output(job_id)
        if not output.exists():
            try:
                replace_file(attempt, output)
                sync_folder(output.parent)
            except OSError as error:
                raise storage_error(output, error) from error

    def read_result(self, job_id: str, fence: int) -> dict[str, Any] | None:
        """Returns the result of a claim: what its worker wrote last, when everything else was on disk; or None."""
        for folder in (self.output(job_id), self.attempt(job_id, fence)):
            if (result := _read_object(folder / RESULT_FILE)) is not None:
                return result
        return None

    def remove_attempts(self, job_id: str, *, but_fence: int | None = None) -> None:
        """Removes what workers left that did not finish, but for the attempt with this fence."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.path(job_id)):
                if (match := _ATTEMPT.fullmatch(entry.name)) and int(match[1]) != but_fence:
                    shutil.rmtree(entry.path, ignore_errors=True)

    def remove(self, job_id: str) -> None:
        """Removes the folder of a job."""
        shutil.rmtree(self.path(job_id), ignore_errors=True)

    def size_bytes(self, job_id: str) -> int:
        """Returns the bytes of all files of a job."""
        return sum(
            os.lstat(os.path.join(folder, name)).st_size
            for folder, _, names in os.walk(self.path(job_id))
            for name in names
        )

    def job_ids(self) -> Iterator[str]:
        """Yields the ids of the jobs that have a folder."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root):
                if is_job_id(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield entry.name


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes the result of a worker, last: when it is on disk, so is every file beside it.

    Raises:
        OSError, CheckpointError: the folder cannot be written.
    """
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            with open(entry.path, "rb+") as file:
                os.fsync(file.fileno())
    write_json(folder / RESULT_FILE, result, fsync=True)
    sync_folder(folder)


def storage_error(path: Path, error: Exception) -> StorageError:
    """Returns the error for a path of the queue that the system refused."""
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"{path} cannot be written: {reason}. Check the disk's free space and its permissions.")


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        data = parse_json(read_text(path))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
