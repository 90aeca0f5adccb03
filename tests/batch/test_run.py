"""Batches with real worker processes and no model: order, failures, stopping, and a second process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kadr.batch import run as run_module
from kadr.batch.outcome import MANIFEST_FILE, RowOutcome
from kadr.batch.progress import BatchProgress
from kadr.batch.row import BatchRow
from kadr.batch.run import QUEUE_FOLDER
from kadr.cancellation import CancelToken, use_token
from kadr.errors import Cancelled, CheckpointError
from kadr.jobs.job import StorageError
from kadr.jobs.store import JobStore
from kadr.jobs.supervisor import Supervisor
from tests.batch.fake_batch import Recorder, contents, fake_batch, statuses
from tests.jobs.fake_maker import END, START, count_lines, read_log


@dataclass
class Stopper(Recorder):
    """Cancels the work when so many rows are finished."""

    token: CancelToken | None = None
    after: int = 1

    def show_outcome(self, progress: BatchProgress, outcome: RowOutcome) -> None:
        super().show_outcome(progress, outcome)
        if self.token is not None and len(self.outcomes) == self.after:
            self.token.cancel()


@dataclass
class Busybody(Recorder):
    """Stops the work while a row is made."""

    token: CancelToken | None = None

    def show_progress(self, progress: BatchProgress, row: BatchRow | None, stage: Mapping[str, Any]) -> None:
        if row is not None and row.number == 2 and self.token is not None:
            self.token.cancel()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the videos."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / MANIFEST_FILE).read_text("utf-8").splitlines()]


def write_rows(tmp_path: Path, *rows: Mapping[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_that_fail_do_not_stop_the_others(tmp_path: Path, out: Path) -> None:
    file = write_rows(
        tmp_path,
        {"prompt": "make 1", "seed": 5},
        {"prompt": "make 2", "sed": 5},
        {"prompt": "refuse"},
        {"prompt": "make 3", "frames": 7},
        {"prompt": "make 4", "model": "missing"},
        {"prompt": "crash once 5"},
        {"prompt": "make 6", "image": "nothing.png"},
    )
    watch = Recorder()
    result = fake_batch(file, out, tmp_path / "log", watch).run()
    assert statuses(result) == ["completed", "failed", "failed", "failed", "failed", "completed", "failed"]
    assert contents(out) == {"001-make-1.mp4": "make 1", "006-crash-once-5.mp4": "crash once 5"}
    assert (result.num_made, [outcome.number for outcome in result.failed]) == (2, [2, 3, 4, 5, 7])
    assert [outcome.number for outcome in watch.outcomes] == [2, 4, 5, 7, 1, 3, 6], (
        "those that cannot be made come first"
    )
    lines = manifest(out)
    assert [line["row"] for line in lines] == list(range(1, 8))
    assert lines[0] | {"seconds": 0} == {
        "row": 1,
        "line": 1,
        "status": "completed",
        "path": "001-make-1.mp4",
        "seed": 5,
        "seconds": 0,
        "error": None,
        "notices": [],
    }
    assert [line["error"] and line["error"]["code"] for line in lines] == [
        None,
        "invalid_row",
        "invalid_request",
        "invalid_row",
        "invalid_row",
        None,
        "invalid_row",
    ]
    assert "no file" in lines[6]["error"]["message"]


def test_nothing_is_opened_where_nothing_is_missing(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path, {"prompt": "make 1"}, {"prompt": "make 1"})
    assert statuses(fake_batch(file, out, tmp_path / "log").run()) == ["completed"] * 2
    assert list(contents(out)) == ["001-make-1.mp4", "002-make-1.mp4"], "two equal rows are two videos"

    def refuse(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Supervisor, "start", refuse)
    watch = Recorder()
    again = fake_batch(file, out, tmp_path / "log", watch)
    monkeypatch.setattr(type(again.checker), "_engine", refuse)
    assert (statuses(again.run()), watch.lines) == (["completed"] * 2, ["2 of 2 rows are done already"])


@pytest.mark.parametrize("kind", [Stopper, Busybody])
def test_stopped_batch_goes_on(tmp_path: Path, out: Path, kind: type[Recorder]) -> None:
    file, log, token = (
        write_rows(tmp_path, *({"prompt": f"busy 0.3 {n}"} for n in range(4))),
        tmp_path / "log",
        CancelToken(),
    )
    watch = kind(token=token)  # type: ignore[call-arg]
    with use_token(token), pytest.raises(Cancelled):
        fake_batch(file, out, log, watch).run()
    made = len(contents(out))
    assert 1 <= made < 4
    assert [line["status"] for line in manifest(out)] == ["completed"] * made + ["queued"] * (4 - made)
    assert watch.lines == [f"{made} of 4 rows are done; run the command again for the others"]
    watch = Recorder()
    result = fake_batch(file, out, log, watch).run()
    assert (statuses(result), result.num_made) == (["completed"] * 4, 4 - made)
    assert count_lines(log, END).most_common(1)[0][1] == 1
    assert watch.left[-1] == 1, "of the last row"


def test_models_do_not_alternate_and_two_workers_share_the_rows(tmp_path: Path, out: Path) -> None:
    rows = [{"prompt": f"slow 0.1 {n}", "model": "ab"[n % 2]} for n in range(8)]
    result = fake_batch(write_rows(tmp_path, *rows), out, tmp_path / "log", workers=2).run()
    assert statuses(result) == ["completed"] * 8
    starts = [(pid, job_id) for event, job_id, _, pid in read_log(tmp_path / "log") if event == START]
    assert len({pid for pid, _ in starts}) == 2
    store = JobStore(out / QUEUE_FOLDER)
    models = [store.get(job_id).engine["model"] for _, job_id in starts]
    store.close()
    assert sum(model != before for before, model in pairwise(models)) <= 3, models


def test_second_process_is_refused(tmp_path: Path, out: Path) -> None:
    file = write_rows(tmp_path, {"prompt": "make"})
    JobStore(out / QUEUE_FOLDER).close()
    store = JobStore(out / QUEUE_FOLDER)
    with pytest.raises(StorageError, match="another process"):
        fake_batch(file, out, tmp_path / "log").run()
    store.close()
    assert statuses(fake_batch(file, out, tmp_path / "log").run()) == ["completed"]


def test_video_that_cannot_be_moved_is_moved_later(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kadr.batch import ledger

    def refuse(*args: Any) -> str:
        raise CheckpointError("the disk is full")

    file = write_rows(tmp_path, {"prompt": "make 1"}, {"prompt": "make 2"})
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "publish", refuse)
        with pytest.raises(CheckpointError, match="the disk is full"):
            fake_batch(file, out, tmp_path / "log").run()
    assert contents(out) == {}
    assert statuses(fake_batch(file, out, tmp_path / "log").run()) == ["completed"] * 2
    assert set(count_lines(tmp_path / "log", END).values()) == {1}


def test_loading_a_model_is_not_taken_for_progress(tmp_path: Path, out: Path) -> None:
    watch = Recorder()
    fake_batch(write_rows(tmp_path, {"prompt": "load"}), out, tmp_path / "log", watch).run()
    assert watch.stages == ["decode"]


def test_notices_and_a_full_disk_are_said(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = iter(["the disk has 3 MB free", "the disk has 3 MB free", None])
    monkeypatch.setattr(run_module, "_STORAGE_SECONDS", 0.0)
    monkeypatch.setattr(Supervisor, "storage_problem", lambda supervisor: next(problems, None))
    watch = Recorder()
    fake_batch(write_rows(tmp_path, {"prompt": "slow 0.5"}), out, tmp_path / "log", watch).run()
    assert watch.lines == ["the disk has 3 MB free", "the disk has room again"]


def test_estimate_comes_from_the_work_of_this_run() -> None:
    now = SimpleNamespace(seconds=100.0)
    rows = [SimpleNamespace(number=n, work=float(n)) for n in range(1, 5)]
    progress: Any = BatchProgress(6, 1, 1, clock=lambda: now.seconds)
    progress.begin(rows)
    assert (progress.num_left, progress.seconds_left) == (4, None)
    now.seconds = 200.0  # the model is open
    progress.advance(rows[3], {"fraction": 0.0})
    assert progress.seconds_left is None
    now.seconds = 210.0
    progress.advance(rows[3], {"fraction": 0.5})
    assert progress.seconds_left == pytest.approx(40.0)  # 2 of 10 took 10 s
    progress.finish(rows[3], RowOutcome(number=4, line=4, status="completed"))
    assert (progress.num_completed, progress.seconds_left) == (2, pytest.approx(15.0))
    progress.finish(rows[2], RowOutcome(number=3, line=3, status="failed"))
    assert (progress.num_failed, progress.num_left, progress.num_made) == (2, 2, 1)
    assert progress.seconds_left == pytest.approx(7.5)


def test_model_of_all_rows_that_cannot_be_opened_is_one_error(tmp_path: Path, out: Path) -> None:
    rows = [{"prompt": f"make {n}", "model": "missing"} for n in range(3)]
    file, watch = write_rows(tmp_path, *rows, {**rows[0], "image": "no.png"}), Recorder()
    with pytest.raises(CheckpointError, match="there is no model missing"):
        fake_batch(file, out, tmp_path / "log", watch).run()
    assert watch.outcomes == []
    assert [line["status"] for line in manifest(out)] == ["queued"] * 4


def test_what_is_fetched_is_fetched_once_for_each_model(tmp_path: Path, out: Path) -> None:
    rows = [{"prompt": f"make {n}", "model": "ab"[n % 2]} for n in range(6)]
    batch = fake_batch(write_rows(tmp_path, *rows), out, tmp_path / "log")
    checked = batch.checker.check(batch.rows)
    assert batch.checker.fetch(checked) == checked
    prepared = [len(engine.prepared) for engine in batch.checker._engines.values()]  # type: ignore[union-attr]
    assert prepared == [1, 1]
    assert Counter(row.work for row in checked) == {0.073728: 6}
