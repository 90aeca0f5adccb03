"""Jobs and results as tests write them, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kadr.jobs.claims import Claim
from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.jobs.folders import JobFolders, write_result
from kadr.jobs.job import NewJob

DEMO = {"model": "demo"}


def new_job(prompt: str = "make", **columns: Any) -> NewJob:
    """Returns a job to submit."""
    return NewJob(**{"request": {"prompt": prompt}, "engine": DEMO, **columns})


def write_video(folders: JobFolders, claim: Claim, text: str = "video") -> dict[str, Any]:
    """Writes what a worker leaves: a video, then its result, which is returned."""
    folder = folders.attempt(claim.job.id, claim.fence)
    folder.mkdir()
    (folder / VIDEO_FILE).write_text(text, "utf-8")
    result = {"file": VIDEO_FILE, "fence": claim.fence}
    write_result(folder, result)
    return result


def wait_until(is_true: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until something is true.

    Raises:
        AssertionError: it is not after so many seconds.
    """
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
