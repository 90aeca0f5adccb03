"""Folders of jobs: the media of each, and what its workers made.

jobs/video_.../job.json         the job as it was submitted
               media/           images and clips of its request
               favorite         is there if it is a favourite
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
FAVORITE_FILE = "favorite"
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
            FileExistsError: the id is taken.
            StorageError: the disk is full, or the folder cannot be written.
        """
        folder = self.path(job_id)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            raise
        except OSError as error:
            raise storage_error(folder, error) from error
        try:
            write_json(folder / JOB_FILE, submitted)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise storage_error(folder, error) from error
        return folder

    def sync_media(self, job_id: str) -> None:
        """Waits until the media of a new job are on disk, if it has any: it must survive a power cut from then on.

        Raises:
            StorageError: the folder cannot be written.
        """
        folder = self.path(job_id)
        try:
            if any(entry.name != JOB_FILE for entry in os.scandir(folder)):
                sync_files(folder)
                sync_folder(self.root)
        except OSError as error:
            raise storage_error(folder, error) from error

    def read_submitted(self, job_id: str) -> dict[str, Any] | None:
        """Returns what was submitted, or None where that is damaged."""
        return _read_object(self.path(job_id) / JOB_FILE)

    def publish(self, job_id: str, fence: int) -> bool:
        """Makes the complete folder of an attempt the result. Does nothing where that has happened.

        Returns:
            False if there is no complete folder: somebody removed it.

        Raises:
            StorageError: the folder cannot be written.
        """
        attempt, output = self.attempt(job_id, fence), self.output(job_id)
        if _read_object(output / RESULT_FILE) is not None:
            return True
        if _read_object(attempt / RESULT_FILE) is None:
            return False
        try:
            if output.exists():  # damaged: its result cannot be read
                shutil.rmtree(output)
            replace_file(attempt, output)
            sync_folder(output.parent)
        except OSError as error:
            raise storage_error(output, error) from error
        return True

    def read_result(self, job_id: str, fence: int) -> dict[str, Any] | None:
        """Returns the result of a claim: what its worker wrote last, when everything else was on disk; or None."""
        for folder in (self.output(job_id), self.attempt(job_id, fence)):
            if (result := _read_object(folder / RESULT_FILE)) is not None:
                return result
        return None

    def set_favorite(self, job_id: str, is_favorite: bool) -> None:
        """Marks a job as a favourite, for whoever restores a lost database, or as none.

        Raises:
            StorageError: the folder cannot be written.
        """
        mark = self.path(job_id) / FAVORITE_FILE
        try:
            if is_favorite:
                mark.touch()
            else:
                mark.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(mark, error) from error

    def is_favorite(self, job_id: str) -> bool:
        """Tells whether a job is marked as a favourite."""
        return (self.path(job_id) / FAVORITE_FILE).exists()

    def attempts(self, job_id: str) -> list[int]:
        """Returns the fences of the attempts that have a folder, the newest first."""
        with suppress(FileNotFoundError):
            matches = [_ATTEMPT.fullmatch(entry.name) for entry in os.scandir(self.path(job_id))]
            return sorted((int(match[1]) for match in matches if match), reverse=True)
        return []

    def finished_at(self, job_id: str) -> float | None:
        """Returns when a result was written, in seconds since 1970; None where there is none."""
        with suppress(OSError):
            return os.stat(self.output(job_id) / RESULT_FILE).st_mtime
        return None

    def remove_attempts(self, job_id: str) -> None:
        """Removes what workers left that did not finish."""
        for fence in self.attempts(job_id):
            shutil.rmtree(self.attempt(job_id, fence), ignore_errors=True)

    def remove(self, job_id: str) -> bool:
        """Removes the folder of a job. Returns false if something of it is still there: Windows keeps open files."""
        folder = self.path(job_id)
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    def size_bytes(self, job_id: str) -> int:
        """Returns the bytes of all files of a job."""
        size = 0
        for folder, _, names in os.walk(self.path(job_id)):
            for name in names:
                with suppress(FileNotFoundError):
                    size += os.lstat(os.path.join(folder, name)).st_size
        return size

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
    sync_files(folder)
    write_json(folder / RESULT_FILE, result, fsync=True)
    sync_folder(folder)


def sync_files(folder: Path) -> None:
    """Waits until all files of a folder and of those in it are on disk.

    Raises:
        OSError: one of them cannot be written.
    """
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            with open(entry.path, "rb+") as file:
                os.fsync(file.fileno())
        elif entry.is_dir(follow_symlinks=False):
            sync_files(Path(entry.path))
    sync_folder(folder)


def storage_error(path: Path, error: BaseException) -> StorageError:
    """Returns the error for a path of the queue that the system refused."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    reason = getattr(cause, "strerror", None) or cause
    return StorageError(f"{path} cannot be written: {reason}. Check the disk's free space and its permissions.")


def _read_object(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None where there is no file, or it is damaged.

    Raises:
        StorageError: the system does not let it be read, which says nothing of the file.
    """
    try:
        data = parse_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    return data if isinstance(data, dict) else None
