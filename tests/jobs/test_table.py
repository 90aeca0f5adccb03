"""The table of jobs belongs to one process, and damaged rows are found when it is opened."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kadr.errors import KadrWarning
from kadr.jobs.job import StorageError
from kadr.jobs.store import JobStore
from kadr.jobs.table import DATABASE_FILE, JobTable
from tests.jobs.jobs_by_hand import new_job


def open_in_another_process(folder: Path) -> str:
    """Returns the error of a second process that opens a queue; an empty text if there is none."""
    try:
        JobTable(folder).close()
    except StorageError as error:
        return str(error)
    return ""


def test_second_process_is_refused_by_name(store: JobStore) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        folder = store.table.folder
        message = pool.apply(open_in_another_process, (folder,))
        assert message == f"another process serves the queue in {folder}. Stop it, or choose another folder."
        store.close()
        assert pool.apply(open_in_another_process, (folder,)) == ""


def test_second_queue_of_one_process_is_refused_too(store: JobStore) -> None:
    with pytest.raises(StorageError, match="another process serves the queue"):
        JobTable(store.table.folder)
    assert store.submit(new_job()).number == 1


def test_queue_that_could_not_be_opened_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / DATABASE_FILE).mkdir()
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot be used"):
            JobTable(tmp_path)


def test_file_in_the_place_of_the_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("a file", "utf-8")
    with pytest.raises(StorageError, match=r"the folder .* cannot be written: .*\. Make it writable, or choose"):
        JobTable(tmp_path / "queue")


@pytest.mark.parametrize(
    "damage",
    ["request = '{'", "id = '../../etc'", "error = '{\"text\": 1}', status = 'failed'", "labels = CAST(x'ff' AS TEXT)"],
)
def test_damaged_row_sets_the_database_aside(open_store: Callable[..., JobStore], damage: str) -> None:
    store = open_store()
    store.submit(new_job())
    with store.table.change() as change:
        store.table.database.mark_complete(change.connection)
    store.close()
    with closing(sqlite3.connect(store.table.folder / DATABASE_FILE)) as connection:
        connection.execute(f"UPDATE jobs SET {damage}")
        connection.commit()
    with pytest.warns(KadrWarning, match="is damaged"):
        store = open_store()
    assert store.jobs().jobs == []
    assert (store.table.folder / "jobs.damaged-1.sqlite").exists()


def test_fences_rise_over_restarts(open_store: Callable[..., JobStore]) -> None:
    store = open_store()
    store.submit(new_job())
    with store.table.change() as change:
        fences = [store.table.next_fence() for _ in range(3)]
        change.update("number = 1", (), fence=fences[-1])
    store.close()
    assert open_store().table.next_fence() == 4
