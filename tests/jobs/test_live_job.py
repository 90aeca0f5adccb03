"""A job in progress: the time left, the part done, and when its worker is overdue."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kadr.jobs.claims import Claim
from kadr.jobs.live_job import LiveJob, Patience

PLAN = {"stage_seconds": {"text": 10.0, "denoise": 60.0, "decode": 30.0}, "layer_seconds": 3.0}
PATIENCE = Patience(start=50.0, beat=5.0, cancel=2.0, stall=20.0, stall_factor=4.0, prepare=100.0)


def live_job(**fields: Any) -> LiveJob:
    return LiveJob(cast(Claim, None), "worker 0", 0.0, **fields)


def progress(stage: str, step: int, of: int, eta: float | None = None) -> dict[str, Any]:
    return {"stage": stage, "step": step, "of": of, "eta": eta}


@pytest.mark.parametrize(
    ("fields", "now", "problem"),
    [
        ({"beat_at": 95.0, "progressed_at": 1.0}, 100.0, None),
        ({"beat_at": 94.0, "progressed_at": 1.0}, 100.0, "gave no sign of life for 5 s"),
        ({"beat_at": 50.0, "progressed_at": 1.0, "has_started": True}, 100.0, None),
        ({"beat_at": 49.0, "progressed_at": 1.0, "has_started": True}, 100.0, "gave no sign of life for 50 s"),
        (
            {"beat_at": 94.0, "progressed_at": 99.0, "has_started": True, "plan": PLAN},
            100.0,
            "gave no sign of life for 5 s",
        ),
        ({"beat_at": 101.0}, 101.0, "made no progress for 100 s"),
        ({"beat_at": 200.0, "plan": PLAN}, 200.0, None),  # the longest stage of its plan, 4 times
        ({"beat_at": 241.0, "plan": PLAN}, 241.0, "made no progress for 240 s"),
        ({"beat_at": 41.0, "plan": PLAN, "progress": progress("text", 1, 2)}, 41.0, "made no progress for 40 s"),
        (
            {"beat_at": 41.0, "plan": PLAN, "progress": progress("text", 2, 2), "is_loading": True},
            41.0,
            None,  # the longest stage may be what it loads for
        ),
        ({"beat_at": 2.0, "cancelled_at": 0.0}, 2.0, None),
        ({"beat_at": 2.5, "cancelled_at": 0.0}, 2.5, "did not stop within 2 s of being cancelled"),
        ({"beat_at": 5.5, "cancelled_at": 0.0, "plan": PLAN}, 5.5, None),  # twice its longest layer
        ({"beat_at": 6.5, "cancelled_at": 0.0, "plan": PLAN}, 6.5, "did not stop within 6 s of being cancelled"),
    ],
)
def test_worker_is_overdue_when_its_patience_ends(fields: dict[str, Any], now: float, problem: str | None) -> None:
    assert live_job(**fields).overdue(PATIENCE, now) == problem


def test_time_left_is_the_stage_by_its_pace_and_later_ones_by_the_plan() -> None:
    assert live_job().seconds_left is None
    assert live_job(plan=PLAN).seconds_left == 100.0
    assert live_job(plan=PLAN, progress=progress("denoise", 1, 8, eta=40.0)).seconds_left == 70.0
    assert live_job(plan=PLAN, progress=progress("denoise", 0, 8)).seconds_left == 90.0
    assert live_job(plan=PLAN, progress=progress("decode", 9, 9, eta=0.0)).seconds_left == 0.0


def test_fraction_rises_from_0_to_1() -> None:
    reports = [progress("text", 0, 1), progress("text", 1, 1), progress("denoise", 4, 8), progress("decode", 9, 9)]
    fractions = [live_job().fraction, live_job(plan=PLAN).fraction]
    fractions += [live_job(plan=PLAN, progress=report).fraction for report in reports]
    assert fractions == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.4, 1.0])


def test_loading_keeps_what_is_done() -> None:
    job = live_job(plan=PLAN, progress=progress("text", 1, 1))
    before = job.report
    job.is_loading = True
    assert job.report == {**before, "is_loading": True}
    assert before["fraction"] == pytest.approx(0.1)
    assert live_job(is_loading=True).report == {
        "stage": None,
        "step": None,
        "of": None,
        "is_loading": True,
        "fraction": 0.0,
        "seconds_left": None,
    }


def test_stage_that_the_plan_does_not_know_counts_as_nothing() -> None:
    job = live_job(plan=PLAN, progress=progress("upload", 1, 1))
    assert job.fraction == 0.0
    assert job.seconds_left == 100.0
