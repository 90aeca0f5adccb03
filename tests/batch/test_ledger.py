"""The rows of a batch and the jobs of earlier runs: which are done, which are made, and which again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kadr import Condition, Request
from kadr.batch.ledger import Ledger
from kadr.batch.outcome import RowOutcome
from kadr.batch.row import BatchRow, key_rows
from kadr.errors import CheckpointError
from kadr.jobs.claims import JobClaims
from kadr.jobs.job import CANCELLED, DATABASE_LOST, DISK_FULL, SERVER_LOST, STORAGE, WORKER_LOST, JobError
from kadr.jobs.store import JobStore
from tests.jobs.jobs_by_hand import new_job, write_video

DEMO, OTHER = {"model": "demo"}, {"model": "other"}


def rows_of(folder: Path, *prompts: str, engine: dict[str, str] = DEMO, **fields: Any) -> list[BatchRow]:
    """Returns a row for each prompt."""
    return key_rows(
        [
            BatchRow(number=n, line=n, request=Request(prompt), engine=engine, **fields)
            for n, prompt in enumerate(prompts, 1)
        ],
        folder,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / ".kadr")
    JobClaims(store).recover()
    yield store
    store.close()


@pytest.fixture
def open_ledger(store: JobStore, tmp_path: Path) -> Callable[..., Ledger]:
    """Opens the ledger of rows, and submits those that are missing."""

    def open_ledger(rows: list[BatchRow], invalid: tuple[RowOutcome, ...] = (), **options: Any) -> Ledger:
        ledger = Ledger(store, tmp_path, rows, invalid, **options)
        assert ledger.keep_pending(list(ledger.pending)) == []
        while ledger.pending:
            ledger.submit_next()
        return ledger

    return open_ledger


def finish(ledger: Ledger, error: JobError | None = None) -> None:
    """Makes the next job, or fails it, and tells the ledger."""
    claims = JobClaims(ledger.store)
    claim = claims.claim()
    assert claim is not None
    if error is not None:
        claims.fail(claim, error)
    else:
        claims.complete(claim, write_video(ledger.store.folders, claim, claim.job.request["prompt"]))
    ledger.finish(ledger.store.get(claim.job.id))


def statuses(ledger: Ledger) -> list[str]:
    return [outcome.status for outcome in ledger.outcomes.values()]


def videos(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.mp4"))}


def test_rows_are_made_once(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a", "b")
    ledger = open_ledger(rows)
    finish(ledger)
    assert (statuses(ledger), len(ledger.waiting)) == (["completed", "queued"], 1)
    again = open_ledger(rows)
    assert (statuses(again), len(again.waiting)) == (["completed", "queued"], 1)
    finish(again)
    last = open_ledger(rows)
    assert (statuses(last), last.waiting) == (["completed", "completed"], {})
    assert videos(tmp_path) == {"001-a.mp4": "a", "002-b.mp4": "b"}
    assert [outcome.path for outcome in last.outcomes.values()] == ["001-a.mp4", "002-b.mp4"]
    assert sum(ledger.store.counts().values()) == 2


def test_video_that_was_not_moved_is_moved_by_the_next_run(
    open_ledger: Callable[..., Ledger], store: JobStore, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, "a")
    open_ledger(rows)
    claims = JobClaims(store)
    claim = claims.claim()
    assert claim is not None
    claims.complete(claim, write_video(store.folders, claim, "a"))  # and the process ends
    assert videos(tmp_path) == {}
    assert statuses(open_ledger(rows)) == ["completed"]
    assert videos(tmp_path) == {"001-a.mp4": "a"}


def test_new_and_changed_rows_are_made_and_removed_ones_stay(
    open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    ledger = open_ledger(rows_of(tmp_path, "a", "b", "c"))
    finish(ledger)
    finish(ledger)  # c is left
    changed = open_ledger(rows_of(tmp_path, "new", "b", "a", "d", "b"))
    assert statuses(changed) == ["queued", "completed", "completed", "queued", "queued"]
    assert [row.request.prompt for row in changed.waiting.values()] == ["new", "d", "b"]
    assert ledger.store.counts()["queued"] == 3, "c is no longer in the file"
    for _ in range(3):
        finish(changed)
    names = {"001-a.mp4": "a", "002-b.mp4": "b", "001-new.mp4": "new", "004-d.mp4": "d", "005-b.mp4": "b"}
    assert videos(tmp_path) == names


def test_row_that_comes_back_is_done(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    finish(open_ledger(rows_of(tmp_path, "a")))
    open_ledger(rows_of(tmp_path, "b"))
    assert statuses(open_ledger(rows_of(tmp_path, "x", "a"))) == ["queued", "completed"]


def test_deleted_video_is_made_again_under_its_name(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a")
    finish(open_ledger(rows))
    (tmp_path / "001-a.mp4").unlink()
    ledger = open_ledger([replace(row, number=5) for row in rows])
    assert len(ledger.waiting) == 1
    finish(ledger)
    assert videos(tmp_path) == {"001-a.mp4": "a"}


@pytest.mark.parametrize("code", [CANCELLED, SERVER_LOST, DATABASE_LOST, DISK_FULL, STORAGE])
def test_failure_that_is_not_of_the_row_is_forgotten(
    open_ledger: Callable[..., Ledger], tmp_path: Path, code: str
) -> None:
    rows = rows_of(tmp_path, "a")
    ledger = open_ledger(rows)
    finish(ledger, JobError(code, "x"))
    assert statuses(ledger) == ["failed"]
    assert statuses(open_ledger(rows)) == ["queued"]


@pytest.mark.parametrize("code", [WORKER_LOST, "out_of_memory", "internal"])
def test_failed_row_stays_so_until_it_is_retried(open_ledger: Callable[..., Ledger], tmp_path: Path, code: str) -> None:
    rows = rows_of(tmp_path, "a")
    finish(open_ledger(rows), JobError(code, "no memory"))
    ledger = open_ledger(rows)
    assert (statuses(ledger), ledger.waiting) == (["failed"], {})
    assert ledger.outcomes[1].error == JobError(code, "no memory")
    retried = open_ledger(rows, retries_failed=True)
    assert statuses(retried) == ["queued"]
    finish(retried)
    assert videos(tmp_path) == {"001-a.mp4": "a"}


def test_job_whose_files_have_moved_is_submitted_anew(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    def row(folder: Path) -> list[BatchRow]:
        request = Request("a", conditions=(Condition(str(folder / "a.png")),))
        return key_rows([BatchRow(number=1, line=1, request=request, engine=DEMO)], folder)

    (first,) = open_ledger(row(tmp_path / "one")).waiting
    (second,) = open_ledger(row(tmp_path / "one")).waiting
    (moved,) = open_ledger(row(tmp_path / "two")).waiting
    assert first == second != moved


def test_length_in_seconds_does_not_change_a_job(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "a", seconds=2.0)
    (first,) = open_ledger([replace(row, request=replace(row.request, frames=48), work=3.0)]).waiting
    again = open_ledger([row])
    assert list(again.waiting) == [first]
    assert again.waiting[first].work == 3.0


def test_rows_of_one_model_follow_each_other(store: JobStore, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a", "b", "c", "d")
    mixed = [replace(row, engine=OTHER if row.number in (2, 4) else DEMO) for row in rows]
    ledger = Ledger(store, tmp_path, mixed)
    ledger.keep_pending(mixed)
    assert [row.number for row in ledger.pending] == [1, 3, 2, 4]


def test_name_that_is_given_comes_first_and_one_that_is_taken_fails(store: JobStore, tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_text("mine")
    first, second, third = rows_of(tmp_path, "a", "b", "c")
    rows = [first, replace(second, output="001-a.mp4"), replace(third, output="mine.mp4")]
    ledger = Ledger(store, tmp_path, rows)
    (refused,) = ledger.keep_pending(rows)
    assert (refused.number, refused.status) == (3, "failed")
    while ledger.pending:
        ledger.submit_next()
    finish(ledger)
    finish(ledger)
    assert videos(tmp_path) == {"001-a-2.mp4": "a", "001-a.mp4": "b", "mine.mp4": "mine"}


def test_outcomes_are_in_the_order_of_the_file(open_ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    first, second = rows_of(tmp_path, "a", "b")
    invalid = RowOutcome(number=2, line=7, status="failed", error=JobError("invalid_row", "x"))
    ledger = open_ledger([first, replace(second, number=3)], (invalid,))
    assert [(outcome.number, outcome.status) for outcome in ledger.outcomes.values()] == [
        (1, "queued"),
        (2, "failed"),
        (3, "queued"),
    ]


def test_jobs_of_a_newer_kadr_are_refused(store: JobStore, tmp_path: Path) -> None:
    store.submit(new_job(labels={"schema": 99, "key": "x", "output": "y"}))
    with pytest.raises(CheckpointError, match="the row of a batch has the schema number 99"):
        Ledger(store, tmp_path, rows_of(tmp_path, "a"))


def test_jobs_without_a_key_are_left_alone(store: JobStore, tmp_path: Path) -> None:
    store.submit(new_job())
    assert len(Ledger(store, tmp_path, rows_of(tmp_path, "a")).pending) == 1
