"""Folders of jobs: a result is there whole or not at all, and names that are no ids reach no file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kadr.jobs.folders import JobFolders, storage_error, sync_files, write_result
from kadr.jobs.job import StorageError, new_job_id

ID = "video_" + "0" * 32


@pytest.fixture
def folders(tmp_path: Path) -> JobFolders:
    """The folders of a queue with one job."""
    folders = JobFolders(tmp_path / "jobs")
    folders.create(ID, {"id": ID})
    return folders


def make_attempt(folders: JobFolders, fence: int, text: str = "video") -> None:
    """Writes what a worker leaves that did not finish."""
    folders.attempt(ID, fence).mkdir()
    (folders.attempt(ID, fence) / "video.mp4").write_text(text, "utf-8")


@pytest.mark.parametrize("name", ["..", "../../etc", "/etc", "video_" + "0" * 31 + "/", "", "video_../" + "0" * 29])
def test_name_that_is_no_id_reaches_no_folder(folders: JobFolders, name: str) -> None:
    with pytest.raises(ValueError, match="is not the id of a job"):
        folders.path(name)


def test_folder_that_exists_is_not_taken(folders: JobFolders) -> None:
    with pytest.raises(FileExistsError):
        folders.create(ID, {"id": "another"})
    assert folders.read_submitted(ID) == {"id": ID}


def test_attempt_without_a_result_is_not_published(folders: JobFolders) -> None:
    make_attempt(folders, 3)
    assert not folders.publish(ID, 3)
    assert folders.read_result(ID, 3) is None
    assert not folders.output(ID).exists()


def test_complete_attempt_becomes_the_output_once(folders: JobFolders) -> None:
    make_attempt(folders, 3)
    write_result(folders.attempt(ID, 3), {"seed": 1})
    assert folders.read_result(ID, 3) == {"seed": 1}
    for _ in range(2):
        assert folders.publish(ID, 3)
        assert folders.read_result(ID, 3) == {"seed": 1}
    assert (folders.output(ID) / "video.mp4").read_text("utf-8") == "video"
    assert not folders.attempt(ID, 3).exists()
    assert folders.finished_at(ID) is not None


def test_result_of_another_fence_does_not_count(folders: JobFolders) -> None:
    make_attempt(folders, 3)
    write_result(folders.attempt(ID, 3), {"seed": 1})
    assert folders.read_result(ID, 4) is None
    assert not folders.publish(ID, 4)


def test_damaged_output_is_replaced_by_a_complete_attempt(folders: JobFolders) -> None:
    folders.output(ID).mkdir()
    (folders.output(ID) / "result.json").write_text("{", "utf-8")
    make_attempt(folders, 4, "whole")
    write_result(folders.attempt(ID, 4), {"seed": 2})
    assert folders.publish(ID, 4)
    assert (folders.output(ID) / "video.mp4").read_text("utf-8") == "whole"


def test_output_that_is_complete_is_not_replaced(folders: JobFolders) -> None:
    make_attempt(folders, 3, "first")
    write_result(folders.attempt(ID, 3), {})
    folders.publish(ID, 3)
    make_attempt(folders, 4, "second")
    assert folders.publish(ID, 4)
    assert (folders.output(ID) / "video.mp4").read_text("utf-8") == "first"


def test_attempts_are_listed_newest_first_and_removed(folders: JobFolders) -> None:
    for fence in (2, 10, 9):
        make_attempt(folders, fence)
    (folders.path(ID) / "output.part").mkdir()
    assert folders.attempts(ID) == [10, 9, 2]
    folders.remove_attempts(ID)
    assert folders.attempts(ID) == []
    assert folders.attempts(new_job_id()) == []


def test_size_counts_all_files(folders: JobFolders) -> None:
    before = folders.size_bytes(ID)
    make_attempt(folders, 2, "x" * 1000)
    assert folders.size_bytes(ID) == before + 1000
    assert folders.size_bytes(new_job_id()) == 0


def test_only_folders_with_ids_are_listed(folders: JobFolders) -> None:
    (folders.root / "notes").mkdir()
    (folders.root / new_job_id()).write_text("a file", "utf-8")
    assert list(folders.job_ids()) == [ID]
    assert list(JobFolders(folders.root / "nothing").job_ids()) == []


def test_removed_folder_is_gone(folders: JobFolders) -> None:
    assert folders.remove(ID)
    assert folders.remove(ID)
    assert list(folders.job_ids()) == []


def test_damaged_json_is_nothing_and_unreadable_json_an_error(folders: JobFolders) -> None:
    path = folders.path(ID) / "job.json"
    for text in ("{", "[1]", "\0", "[" * 1000):
        path.write_text(text, "utf-8")
        assert folders.read_submitted(ID) is None
    path.unlink()
    assert folders.read_submitted(ID) is None
    path.mkdir()  # stands for what the system does not let be read
    with pytest.raises(StorageError, match="cannot be read"):
        folders.read_submitted(ID)


def test_all_files_are_synced(folders: JobFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders.path(ID) / "media").mkdir()
    (folders.path(ID) / "media" / "a.png").write_bytes(b"a")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    folders.sync_media(ID)
    files = [folders.path(ID) / "job.json", folders.path(ID) / "media" / "a.png"]
    names = [] if sys.platform == "win32" else [folders.path(ID), folders.path(ID) / "media", folders.root]
    assert {path.stat().st_ino for path in (*files, *names)} == set(synced)


def test_job_without_media_waits_for_no_disk(folders: JobFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("it waited"))
    folders.sync_media(ID)


def test_files_of_a_folder_that_is_gone_are_an_error(folders: JobFolders) -> None:
    with pytest.raises(FileNotFoundError):
        sync_files(folders.root / "gone")
    with pytest.raises(FileNotFoundError):
        write_result(folders.attempt(ID, 1), {})


def test_error_names_the_path_and_the_reason_of_the_system(tmp_path: Path) -> None:
    cause = OSError(28, "No space left on device")
    for error in (cause, _caused_by(cause)):
        message = str(storage_error(tmp_path, error))
        assert message.startswith(f"{tmp_path} cannot be written: No space left on device. Check")


def _caused_by(cause: OSError) -> Exception:
    error = RuntimeError("x cannot be written: No space left on device. Write it elsewhere.")
    error.__cause__ = cause
    return error
