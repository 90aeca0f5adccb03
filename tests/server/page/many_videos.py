"""Many finished videos, made of one: the files are links, so that this takes a second."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kadr.jobs.job import COMPLETED, new_job_id
from kadr.jobs.store import JobStore


def multiply_video(folder: Path, count: int) -> None:
    """Fills a queue that no server has open: `count` videos in all, like its only one, but for their prompts."""
    store = JobStore(folder)
    try:
        (job,) = store.jobs(statuses=(COMPLETED,)).jobs
        ((row),) = store.table.database.rows("SELECT * FROM jobs WHERE id = ?", (job.id,))
        with store.table.change() as change:
            for number in range(1, count):
                columns = {name: row[name] for name in row.keys() if name not in ("number", "seq")}  # noqa: SIM118
                columns["request"] = {**job.request, "prompt": f"{job.request['prompt']}, number {number}"}
                copy = change.insert(**{**columns, "id": new_job_id()})
                shutil.copytree(store.folders.path(job.id), store.folders.path(copy.id), copy_function=os.link)
    finally:
        store.close()
