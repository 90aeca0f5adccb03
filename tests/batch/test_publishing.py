"""A finished video gets its name in the folder once, whenever the process ends, and replaces nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.batch import publishing
from kadr.batch.publishing import find_published, is_unpublished, publish
from kadr.errors import CheckpointError
from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.jobs.folders import OUTPUT_FOLDER


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """The folder of a job with a finished video."""
    folder = tmp_path / ".kadr" / "job"
    (folder / OUTPUT_FOLDER).mkdir(parents=True)
    (folder / OUTPUT_FOLDER / VIDEO_FILE).write_bytes(b"video")
    return folder


def publish_here(job_folder: Path, name: str = "a.mp4") -> str:
    """Publishes into the folder above that of the queue; a name that is taken becomes b.mp4, then bb.mp4."""
    return publish(job_folder, job_folder.parents[1], name, lambda taken: "b.mp4" if taken == "a.mp4" else f"b{taken}")


def videos(job_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in job_folder.parents[1].glob("*.mp4")}


def test_video_moves_into_the_folder(job_folder: Path) -> None:
    assert (find_published(job_folder), is_unpublished(job_folder)) == (None, True)
    assert publish_here(job_folder) == "a.mp4"
    assert videos(job_folder) == {"a.mp4": b"video"}
    assert (find_published(job_folder), is_unpublished(job_folder)) == ("a.mp4", False)


def test_nothing_is_replaced(job_folder: Path) -> None:
    (job_folder.parents[1] / "a.mp4").write_bytes(b"somebody's")
    (job_folder.parents[1] / "b.mp4").touch()  # empty, but not ours
    assert publish_here(job_folder) == "bb.mp4"
    assert videos(job_folder) == {"a.mp4": b"somebody's", "b.mp4": b"", "bb.mp4": b"video"}
    assert find_published(job_folder) == "bb.mp4"


@pytest.mark.parametrize("step", ["write_json", "open", "replace_file", "sync_folder"])
@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("is_taken", [True, False])
def test_publishing_goes_on_where_it_broke_off(
    job_folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_before: bool, is_taken: bool
) -> None:
    if is_taken:
        (job_folder.parents[1] / "a.mp4").write_bytes(b"somebody's")
    original: Callable[..., Any] = open if step == "open" else getattr(publishing, step)

    def end_process(*args: Any, **kwargs: Any) -> None:
        if not is_before:
            original(*args, **kwargs).close() if step == "open" else original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(publishing, step, end_process, raising=False)
        with pytest.raises(Killed):
            publish_here(job_folder)
    if is_unpublished(job_folder):
        publish_here(job_folder)
    name = find_published(job_folder)
    assert name == ("b.mp4" if is_taken else "a.mp4")
    others = {"a.mp4": b"somebody's"} if is_taken else {}
    assert videos(job_folder) == {**others, name: b"video"}


def test_folder_that_cannot_be_written_leaves_the_video(job_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "replace_file", refuse)
        with pytest.raises(
            CheckpointError, match=r"a\.mp4 cannot be written: Read-only file system. The video lies in"
        ):
            publish_here(job_folder)
    assert publish_here(job_folder) == "a.mp4"
    assert videos(job_folder) == {"a.mp4": b"video"}


@pytest.mark.parametrize("record", ["", "[]", '{"file": 5}', "{"])
def test_damaged_record_names_no_video(job_folder: Path, record: str) -> None:
    publish_here(job_folder)
    (job_folder / "published.json").write_text(record)
    assert find_published(job_folder) is None
