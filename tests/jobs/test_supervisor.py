"""Workers that die, hang, stall or do not stop are replaced, and each job ends in exactly one way."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kadr.jobs import queue as queue_module
from kadr.jobs import supervisor as supervisor_module
from kadr.jobs.claims import Claim, JobClaims
from kadr.jobs.events import DELETED, JOB, PREVIEW, PROGRESS, QUEUE, Event
from kadr.jobs.job import COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job, StorageError, UnknownJobError
from kadr.jobs.live_job import Patience
from kadr.jobs.queue import JobQueue
from kadr.jobs.worker import WorkerProcess
from tests.jobs.fake_maker import END, START, FakeMaker, count_lines, read_log
from tests.jobs.jobs_by_hand import new_job, wait_until

PATIENCE = Patience(start=20.0, beat=2.5, cancel=0.5, stall=1.0, stall_factor=0.0, prepare=5.0)
needs_signals = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


class RunningQueue:
    """A running queue with a fake maker.

    Args:
        num_workers: how many there are.
    """

    def __init__(self, folder: Path, num_workers: int = 1, **arguments: Any) -> None:
        self.log, self.lines, self.events = folder / "log", list[str](), list[Event]()
        makers = [partial(FakeMaker, self.log)] * num_workers
        self.queue = JobQueue(
            folder / "queue",
            makers,
            **{"patience": PATIENCE, "log": self.lines.append, "min_free_bytes": 0} | arguments,
        )
        self.store, self.supervisor = self.queue.store, self.queue.supervisor
        self.queue.events.subscribe(self.events.append)
        self.queue.start()

    def submit(self, prompt: str, **columns: Any) -> Job:
        return self.store.submit(new_job(prompt, **columns))

    def finish(self, job: Job, seconds: float = 20.0) -> Job:
        """Waits until a job is finished, and returns it."""
        wait_until(lambda: self.store.get(job.id).is_finished, seconds)
        return self.store.get(job.id)

    def wait_for_start(self, job: Job) -> int:
        """Waits until a worker makes a job, and returns the number of its process."""
        wait_until(lambda: count_lines(self.log, START)[job.id])
        return next(pid for event, job_id, _, pid in reversed(read_log(self.log)) if (event, job_id) == (START, job.id))

    def logged(self, *words: str) -> bool:
        """Tells whether a line for the operator has all these words."""
        return any(all(word in line for word in words) for line in self.lines)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(supervisor_module, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(supervisor_module, "RESTART_SECONDS", 0.1)


@pytest.fixture
def start_queue(tmp_path: Path) -> Iterator[Callable[..., RunningQueue]]:
    """Starts queues, and closes them at the end: no worker may be left."""
    queues: list[RunningQueue] = []

    def start(**arguments: Any) -> RunningQueue:
        queues.append(RunningQueue(tmp_path, **arguments))
        return queues[-1]

    others = spawned_children()  # of other tests, such as the check of uploads
    yield start
    for running in queues:
        running.queue.close()
    assert spawned_children() <= others


def spawned_children() -> set[int]:
    """The processes that this one has spawned, and that run."""
    return {child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())}


@pytest.fixture
def running(start_queue: Callable[..., RunningQueue]) -> RunningQueue:
    """A queue with one worker."""
    return start_queue()


def seqs(events: Sequence[Event]) -> list[int]:
    return [event.seq for event in events]


def test_jobs_are_made_in_turn_and_reported(running: RunningQueue) -> None:
    jobs = [running.submit(prompt) for prompt in ("make", "busy 0.3", "large 1", "refuse")]
    statuses = [running.finish(job).status for job in jobs]
    assert statuses == [COMPLETED] * 3 + [FAILED]
    error = running.store.get(jobs[3].id).error
    assert error is not None
    assert (error.code, error.message) == ("invalid_request", "frames is 7; it must be 8k+1.")
    assert (running.store.folders.output(jobs[0].id) / "video.mp4").read_text("utf-8") == "make"
    assert seqs(running.events) == sorted(set(seqs(running.events)))
    fractions = [event.data["fraction"] for event in running.events if event.kind == PROGRESS]
    assert 0 <= min(fractions) < 0.2
    assert fractions[-1] > 0.9
    assert [event.job_id for event in running.events if event.kind == PREVIEW] == [jobs[2].id]
    assert running.supervisor.live == {}


def test_pipe_full_of_reports_keeps_their_order(running: RunningQueue) -> None:
    stop = threading.Event()

    def submit_and_delete() -> None:
        while not stop.is_set():
            running.store.delete(running.submit("make", priority=-100).id)

    thread = threading.Thread(target=submit_and_delete)
    thread.start()
    running.finish(running.submit("busy 1.5", priority=100))
    stop.set()
    thread.join()
    assert seqs(running.events) == sorted(set(seqs(running.events)))
    assert {event.kind for event in running.events} == {JOB, PROGRESS, DELETED}


@needs_signals
def test_killed_worker_is_replaced_and_its_job_made_once_more(running: RunningQueue) -> None:
    job = running.submit("slow 0.4")  # well below the patience of 1 s
    os.kill(running.wait_for_start(job), signal.SIGKILL)
    finished = running.finish(job)
    assert (finished.status, finished.attempt) == (COMPLETED, 2)
    assert running.logged(job.id, "the worker was killed by signal 9", "is replaced")
    assert count_lines(running.log, END) == {job.id: 1}


def test_job_that_kills_every_worker_fails_and_others_are_made(running: RunningQueue) -> None:
    bad, good = running.submit("crash"), running.submit("make")
    error = running.finish(bad).error
    assert error is not None
    assert error.code == "worker_lost"
    assert error.message == ("the worker ended with exit code 7, 2 times. Ask for less, or look into the server's log.")
    assert running.finish(good).status == COMPLETED
    assert count_lines(running.log, START) == {bad.id: 2, good.id: 1}
    assert running.store.folders.attempts(bad.id) == []


def test_job_that_kills_one_worker_is_made_by_the_next(running: RunningQueue) -> None:
    job = running.submit("crash once")
    assert running.finish(job).status == COMPLETED
    assert count_lines(running.log, END) == {job.id: 1}


def test_whole_video_of_a_worker_that_died_is_not_made_again(running: RunningQueue) -> None:
    job = running.submit("crash whole once")
    assert running.finish(job).status == COMPLETED
    assert count_lines(running.log, START) == {job.id: 1}
    assert (running.store.folders.output(job.id) / "video.mp4").exists()


@needs_signals
def test_worker_that_stops_itself_is_replaced(running: RunningQueue) -> None:
    job = running.submit("freeze")
    error = running.finish(job, seconds=30).error
    assert error is not None
    assert error.code == "worker_lost"
    assert running.logged(job.id, "gave no sign of life for 2 s") or running.logged(job.id, "made no progress for 1 s")


@needs_signals
def test_idle_worker_that_is_stopped_or_killed_costs_no_attempt(running: RunningQueue) -> None:
    running.finish(running.submit("make"))
    for number in (signal.SIGKILL, signal.SIGSTOP):
        worker = running.supervisor.slots[0].worker
        assert worker is not None
        os.kill(worker.pid or 0, number)
        job = running.finish(running.submit("make"))
        assert (job.status, job.attempt) == (COMPLETED, 1)
        assert count_lines(running.log, START)[job.id] == 1


def test_worker_without_progress_is_replaced(running: RunningQueue) -> None:
    error = running.finish(running.submit("hang")).error
    assert error is not None
    assert error.code == "worker_lost"
    assert "made no progress for 1 s, 2 times" in error.message


@pytest.mark.parametrize("prompt", ["hang", "flood"])
def test_worker_that_ignores_cancelling_is_killed(start_queue: Callable[..., RunningQueue], prompt: str) -> None:
    running = start_queue(patience=Patience(cancel=0.5))
    job = running.submit(prompt)
    pid = running.wait_for_start(job)
    began = time.monotonic()
    assert running.store.cancel(job.id).cancel_requested
    finished = running.finish(job)
    assert time.monotonic() - began < 5
    assert finished.error is not None
    assert finished.error.code == "cancelled"
    assert running.logged(job.id, "did not stop within 0 s of being cancelled")
    wait_until(lambda: not psutil.pid_exists(pid))
    assert running.finish(running.submit("make")).status == COMPLETED


def test_cancelling_stops_a_job_in_progress_and_keeps_its_worker(running: RunningQueue) -> None:
    job, other = running.submit("slow 30"), running.submit("make")
    pid = running.wait_for_start(job)
    running.store.cancel(job.id)
    error = running.finish(job).error
    assert error is not None
    assert error.code == "cancelled"
    assert running.finish(other).status == COMPLETED
    assert running.wait_for_start(other) == pid


def test_cancelling_one_that_waits_touches_nothing_else(running: RunningQueue) -> None:
    first, second = running.submit("slow 0.5"), running.submit("make")
    running.wait_for_start(first)
    assert running.store.cancel(second.id).status == FAILED
    assert running.finish(first).status == COMPLETED
    assert count_lines(running.log, START) == {first.id: 1}


def test_job_that_is_cancelled_before_its_worker_knows_it_stops(
    running: RunningQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_job = JobClaims.claim

    def claim_and_cancel(claims: JobClaims, **arguments: Any) -> Claim | None:
        claim = claim_job(claims, **arguments)
        if claim is not None:
            claims.store.cancel(claim.job.id)
        return claim

    monkeypatch.setattr(JobClaims, "claim", claim_and_cancel)
    error = running.finish(running.submit("slow 30")).error
    assert error is not None
    assert error.code == "cancelled"


def test_deleting_a_job_in_progress_stops_it(running: RunningQueue) -> None:
    job = running.submit("slow 30")
    pid = running.wait_for_start(job)
    running.store.delete(job.id)
    with pytest.raises(UnknownJobError):
        running.store.get(job.id)
    other = running.submit("make")
    assert running.finish(other).status == COMPLETED
    assert running.wait_for_start(other) == pid
    assert set(running.store.folders.job_ids()) == {other.id}
    assert [event.job_id for event in running.events if event.kind == DELETED] == [job.id]


def test_stopping_gives_jobs_back(start_queue: Callable[..., RunningQueue]) -> None:
    running = start_queue(num_workers=2, patience=Patience(cancel=0.5))
    jobs = [running.submit(prompt) for prompt in ("slow 30", "hang", "make")]
    for job in jobs[:2]:
        running.wait_for_start(job)
    began = time.monotonic()
    running.queue.close()
    assert time.monotonic() - began < 5
    running = start_queue(num_workers=0)
    assert [(job.id, job.status, job.attempt) for job in running.store.waiting()] == [
        (job.id, QUEUED, 0) for job in jobs
    ]


def test_stopping_while_a_worker_starts_is_quick(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "queue", [partial(FakeMaker, tmp_path / "log", 60.0)])
    queue.start()
    wait_until(lambda: queue.supervisor.slots[0].worker)
    began = time.monotonic()
    queue.close()
    assert time.monotonic() - began < 3


@needs_signals
def test_stopping_with_a_stopped_worker_is_quick(start_queue: Callable[..., RunningQueue]) -> None:
    running = start_queue(patience=Patience(cancel=0.5))
    job = running.submit("slow 30")
    os.kill(running.wait_for_start(job), signal.SIGSTOP)
    began = time.monotonic()
    running.queue.close()
    assert time.monotonic() - began < 4
    assert [waiting.id for waiting in start_queue(num_workers=0).store.waiting()] == [job.id]


def test_stopping_while_the_disk_is_full_is_quick(running: RunningQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise StorageError("the disk is full.")

    job = running.submit("slow 0.2")
    running.wait_for_start(job)
    with monkeypatch.context() as patch:
        patch.setattr(JobClaims, "complete", refuse)
        wait_until(lambda: running.logged("the disk is full. It is tried again."))
        assert running.store.get(job.id).status == IN_PROGRESS
        running.supervisor.stop()
    running.queue.claims.recover()
    assert running.store.get(job.id).status == COMPLETED
    assert count_lines(running.log, START) == {job.id: 1}


def test_result_is_recorded_when_the_disk_has_room_again(
    running: RunningQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, complete = [], JobClaims.complete

    def refuse_twice(claims: JobClaims, claim: Claim, result: Any) -> None:
        calls.append(claim)
        if len(calls) < 3:
            raise StorageError("the disk is full.")
        complete(claims, claim, result)

    monkeypatch.setattr(JobClaims, "complete", refuse_twice)
    job = running.finish(running.submit("make"))
    assert (job.status, len(calls)) == (COMPLETED, 3)
    assert count_lines(running.log, START) == {job.id: 1}


def test_no_job_begins_while_the_disk_is_nearly_full(
    start_queue: Callable[..., RunningQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_queue(min_free_bytes=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**5))
    job = running.submit("make")
    wait_until(lambda: running.logged("has 0 MB free, and jobs begin at 1 MB"))
    time.sleep(0.4)
    assert running.store.get(job.id).status == QUEUED
    assert sum("MB free" in line for line in running.lines) == 1  # said once
    monkeypatch.undo()
    assert running.finish(job).status == COMPLETED


@pytest.mark.parametrize(
    ("prompt", "message", "code"),
    [
        ("full", "No space left on device.", "disk_full"),
        ("refuse folder", "may not be written to by this user.", "invalid_media"),
    ],
)
def test_job_that_the_disk_refuses_waits_until_it_does_not(
    start_queue: Callable[..., RunningQueue], monkeypatch: pytest.MonkeyPatch, prompt: str, message: str, code: str
) -> None:
    running, has_room = start_queue(min_free_bytes=10**6), threading.Event()

    def disk_usage(folder: Path) -> SimpleNamespace:
        is_full = count_lines(running.log, START) and not has_room.is_set()
        return SimpleNamespace(free=0 if is_full else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    job = running.submit(prompt)
    wait_until(lambda: running.logged(job.id, message, "It waits: the disk", "has 0 MB free"))
    wait_until(lambda: running.store.get(job.id).status == QUEUED)
    time.sleep(0.3)
    assert count_lines(running.log, START) == {job.id: 1}
    has_room.set()
    error = running.finish(job).error  # there was room, and it did not help
    assert error is not None
    assert error.code == code
    assert count_lines(running.log, START) == {job.id: 2}


@pytest.mark.skipif(sys.platform == "win32", reason="os.access does not know a read-only folder there")
def test_no_job_begins_in_a_folder_that_cannot_be_written(
    running: RunningQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    job = running.submit("make")
    wait_until(lambda: running.logged("cannot be written. Make it writable; jobs begin then."))
    assert running.store.get(job.id).status == QUEUED
    monkeypatch.undo()
    assert running.finish(job).status == COMPLETED


def test_pause_holds_jobs_back(running: RunningQueue) -> None:
    running.store.set_paused(True)
    job = running.submit("make")
    time.sleep(0.4)
    assert running.store.get(job.id).status == QUEUED
    running.store.set_paused(False)
    assert running.finish(job).status == COMPLETED


@pytest.mark.skipif(sys.platform == "win32", reason="os.access does not know a read-only folder there")
@pytest.mark.parametrize("prompt", [None, "busy 60"])
def test_problem_of_the_disk_is_an_event_once_each_time(
    start_queue: Callable[..., RunningQueue], monkeypatch: pytest.MonkeyPatch, prompt: str | None
) -> None:
    """Also while every worker makes a job, and looks at the disk only afterwards."""
    monkeypatch.setattr(queue_module, "MAINTENANCE_SECONDS", 0.1)
    running = start_queue()

    def seen() -> list[tuple[bool, bool]]:
        data = [event.data for event in running.events if event.kind == QUEUE]
        return [(item["paused"], item["problem"] is not None) for item in data]

    if prompt is not None:
        running.wait_for_start(running.submit(prompt))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        wait_until(lambda: seen() == [(False, True)])
        running.queue.set_paused(True)
        time.sleep(0.5)
        assert seen() == [(False, True), (True, True)]
    wait_until(lambda: seen() == [(False, True), (True, True), (True, False)])
    running.queue.set_paused(False)
    assert seen()[3:] == [(False, False)]


def test_workers_share_the_queue(start_queue: Callable[..., RunningQueue]) -> None:
    running = start_queue(num_workers=2)
    wait_until(lambda: running.supervisor.num_ready == 2)
    jobs = [running.submit("slow 0.1") for _ in range(10)]
    for job in jobs:
        assert running.finish(job).status == COMPLETED
    assert count_lines(running.log, START) == dict.fromkeys([job.id for job in jobs], 1)
    assert len({pid for _, _, _, pid in read_log(running.log)}) == 2


def test_worker_that_does_not_start_is_started_again(tmp_path: Path) -> None:
    lines: list[str] = []
    makers = [partial(FakeMaker, tmp_path / "log", "not a number of seconds")]
    queue = JobQueue(tmp_path / "queue", makers, log=lines.append)
    queue.start()
    job = queue.store.submit(new_job())
    wait_until(lambda: sum("did not start: the worker ended with exit code 1" in line for line in lines) >= 2)
    assert queue.supervisor.num_ready == 0
    assert queue.store.get(job.id).status == QUEUED
    queue.close()


def test_worker_that_is_not_ready_in_time_is_started_again(start_queue: Callable[..., RunningQueue]) -> None:
    running = start_queue(patience=Patience(start=0.01))
    wait_until(lambda: running.logged("worker 0 was not ready within 0 s; it is started again"))


def test_system_that_starts_no_process_is_tried_again(
    start_queue: Callable[..., RunningQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, attempts = WorkerProcess.__init__, []

    def refuse_once(worker: WorkerProcess, *arguments: Any) -> None:
        attempts.append(arguments)
        if len(attempts) == 1:
            raise OSError(11, "Resource temporarily unavailable")
        start(worker, *arguments)

    monkeypatch.setattr(WorkerProcess, "__init__", refuse_once)
    running = start_queue()
    assert running.finish(running.submit("make")).status == COMPLETED
    assert running.logged("did not start: Resource temporarily unavailable")


def test_bug_in_the_supervisor_does_not_end_the_queue(running: RunningQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(supervisor_module.Supervisor, "storage_problem", fail)
        wait_until(lambda: running.logged("unexpected ZeroDivisionError: a bug. Please report it."))
    assert running.finish(running.submit("make")).status == COMPLETED


def test_memory_of_an_idle_worker_is_known_to_whoever_plans(start_queue) -> None:
    queue = start_queue()
    wait_until(lambda: queue.supervisor.device_bytes == FakeMaker.device_bytes)
