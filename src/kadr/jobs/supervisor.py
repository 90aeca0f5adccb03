"""`Supervisor`: keeps workers running, gives them jobs, and replaces those that die, hang or do not stop.

Each worker has a thread here. It claims a job, hands it over, takes reports until the job is made or has failed, and
settles it: what a worker wrote becomes the result only here, and only while its claim holds.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Condition, RLock, Thread
from typing import Any

from kadr.jobs.claims import Claim, JobClaims
from kadr.jobs.engine_maker import Task
from kadr.jobs.events import NOTICE, PREVIEW, PROGRESS, QUEUE, Event, EventLog
from kadr.jobs.job import CANCELLED, DISK_FULL, STORAGE, JobError, LostClaimError, StorageError
from kadr.jobs.live_job import LiveJob, Patience
from kadr.jobs.table import JobChange
from kadr.jobs.worker import INVALID_MEDIA, MODEL_ERROR, MakerFactory, WorkerProcess

IDLE_SECONDS = 1.0  # between looks at the disk and at the pause, where nothing is announced
WATCH_SECONDS = 0.2  # between looks at the deadlines of a worker
MIN_FREE_BYTES = 512 * 10**6  # of the disk with the queue; below it no job begins
_CODES_OF_STORAGE = (DISK_FULL, STORAGE, INVALID_MEDIA, MODEL_ERROR)  # of errors that a full disk may be behind
RESTART_SECONDS = 5.0  # before a worker is started again that ended before it was ready


class Supervisor:
    """Runs the workers of a queue.

    Args:
        claims: of the queue.
        events: takes progress, previews and notices.
        makers: what each worker makes videos with; one worker for each.
        patience: see `Patience`.
        clock: monotonic seconds.
        min_free_bytes: of the disk; below it no job begins.
        log: takes lines for the operator.
    """

    def __init__(
        self,
        claims: JobClaims,
        events: EventLog,
        makers: Sequence[MakerFactory],
        *,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        min_free_bytes: int = MIN_FREE_BYTES,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.claims, self.events, self.log = claims, events, log
        self.patience, self.clock, self.min_free_bytes = patience or Patience(), clock, min_free_bytes
        self.lock = RLock()
        self.is_stopping, self._has_problem = False, False
        self._announced_state = (claims.store.is_paused, False)  # whether it is paused, and has a problem
        self.live: dict[str, LiveJob] = {}
        self.slots = [_Slot(self, f"worker {index}", maker) for index, maker in enumerate(makers)]

    @property
    def changed(self) -> Condition:
        return self.claims.store.table.changed

    @property
    def folder(self) -> Path:
        return self.claims.store.table.folder

    def start(self) -> None:
        """Starts the workers."""
        for slot in self.slots:
            slot.thread.start()

    def stop(self) -> None:
        """Stops the workers, and puts their jobs back into the queue. Jobs are cancelled first, and killed if slow."""
        with self.changed:
            self.is_stopping = True
            self.changed.notify_all()
        for slot in self.slots:
            slot.cancel(None)
        for slot in self.slots:
            if slot.thread.is_alive():
                slot.thread.join()

    @property
    def num_ready(self) -> int:
        """Number of workers that make a job or could."""
        return sum(slot.is_ready for slot in self.slots)

    @property
    def device_bytes(self) -> int:
        """Bytes of its device that the largest worker takes, and that the next job can have."""
        return max((slot.device_bytes for slot in self.slots), default=0)

    def storage_problem(self) -> str | None:
        """Says why no job begins; None where nothing is wrong with the disk."""
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"the folder {self.folder} cannot be read: {error.strerror or error}. Jobs begin when it can."
        if not os.access(self.folder, os.W_OK):
            return f"the folder {self.folder} cannot be written. Make it writable; jobs begin then."
        if free < self.min_free_bytes:
            return (
                f"the disk with {self.folder} has {free / 1e6:.0f} MB free, and jobs begin at "
                f"{self.min_free_bytes / 1e6:.0f} MB. Free some, or delete videos."
            )
        return None

    def log_problem(self, problem: str | None) -> None:
        """Logs why no job begins, once for each time that it happens; None: nothing is wrong any more."""
        if problem is not None and not self._has_problem:
            self.log(problem)
        self._has_problem = problem is not None

    def announce_state(self, problem: str | None) -> None:
        """Publishes an event if the queue was paused or resumed, or a problem came or went, since the last one.

        Args:
            problem: of `storage_problem`.
        """
        table = self.claims.store.table
        with table.lock:  # so that events come in the order of their numbers
            state = (self.claims.store.is_paused, problem is not None)
            if state != self._announced_state:
                self._announced_state = state
                data = {"paused": state[0], "problem": problem}
                self.events.publish(Event(table.next_seq(), QUEUE, None, None, data))

    def on_change(self, change: JobChange) -> None:
        """Tells the worker of a job that it was cancelled; called with each change of the queue."""
        job = change.job
        with self.lock:
            live = self.live.get(job.id)
        if live is not None and job.cancel_requested and live.claim.fence == job.fence:
            for slot in self.slots:
                slot.cancel(live.claim)


class _Slot:
    """One worker and the thread that watches it."""

    def __init__(self, supervisor: Supervisor, name: str, create_maker: MakerFactory) -> None:
        self.supervisor, self.name, self._create_maker = supervisor, name, create_maker
        self.thread = Thread(target=self._run, name=f"kadr {name}", daemon=True)
        self.worker: WorkerProcess | None = None
        self.warm_engines: Sequence[str] = ()
        self.live: LiveJob | None = None
        self.is_ready, self.device_bytes = False, 0
        self._heard_at = 0.0  # when the worker last gave a sign of life

    def cancel(self, claim: Claim | None) -> None:
        """Cancels the job that is made, if it is of this claim; None: whichever."""
        with self.supervisor.lock:
            worker, live = self.worker, self.live
            if worker is None or live is None or (claim is not None and live.claim is not claim):
                return
            if live.cancelled_at is None:
                live.cancelled_at = self.supervisor.clock()
        worker.send("cancel", live.claim.fence)

    def _run(self) -> None:
        supervisor = self.supervisor
        while not supervisor.is_stopping:
            try:
                self._take_turn()
            except StorageError as error:
                supervisor.log_problem(str(error))
                self._pause(IDLE_SECONDS)
            except Exception as error:  # a bug must not leave the queue without this worker
                supervisor.log(f"{self.name}: unexpected {type(error).__name__}: {error}. Please report it.")
                self._kill_worker()
                self._pause(RESTART_SECONDS)
        self._kill_worker()

    def _take_turn(self) -> None:
        """Makes the next job, or waits a while where there is none or nothing to make it with."""
        supervisor = self.supervisor
        if not self._has_live_worker() and not self._start_worker():
            self._pause(RESTART_SECONDS)
            return
        problem = supervisor.storage_problem()
        supervisor.announce_state(problem)
        claim = None if problem else supervisor.claims.claim(warm_engines=self.warm_engines)
        supervisor.log_problem(problem)
        if claim is None:
            self._pause(IDLE_SECONDS)
        else:
            self._make(claim)

    def _pause(self, seconds: float) -> None:
        """Waits until something changes in the queue, so many seconds at most."""
        with self.supervisor.changed:
            if not self.supervisor.is_stopping:
                self.supervisor.changed.wait(seconds)

    def _start_worker(self) -> bool:
        try:
            worker = WorkerProcess(self._create_maker, f"kadr {self.name}")
        except OSError as error:
            self.supervisor.log(f"{self.name} did not start: {error.strerror or error}; it is started again")
            return False
        deadline = self.supervisor.clock() + self.supervisor.patience.start
        with self.supervisor.lock:
            self.worker = worker
        try:
            while self.supervisor.clock() < deadline and not self.supervisor.is_stopping:
                if (report := worker.receive(WATCH_SECONDS)) is not None and report[0] == "ready":
                    self.warm_engines, self.is_ready = report[1], True
                    self._heard_at = self.supervisor.clock()
                    return True
            reason = f"was not ready within {self.supervisor.patience.start:.0f} s"
        except EOFError:
            reason = f"did not start: {worker.describe_end()}"
        if not self.supervisor.is_stopping:
            self.supervisor.log(f"{self.name} {reason}; it is started again")
        self._kill_worker()
        return False

    def _kill_worker(self) -> None:
        with self.supervisor.lock:
            worker, self.worker, self.warm_engines, self.is_ready = self.worker, None, (), False
            self.device_bytes = 0
        if worker is not None and not worker.kill():
            self.supervisor.log(f"{self.name}: process {worker.pid} does not end; the system holds it")

    def _has_live_worker(self) -> bool:
        """Takes the signs of life of an idle worker. One that is gone, or gives none, is killed before the next job."""
        if self.worker is None:
            return False
        patience, problem = self.supervisor.patience.beat, None
        try:
            while (report := self.worker.receive(0)) is not None:
                self._heard_at = self.supervisor.clock()
                self._take_beat(*report)
        except EOFError:
            problem = self.worker.describe_end()
        if self.supervisor.clock() - self._heard_at > patience:
            problem = f"the worker gave no sign of life for {patience:.0f} s"
        if problem is not None:
            self.supervisor.log(f"{self.name}: {problem}; it is replaced")
            self._kill_worker()
        return problem is None

    def _make(self, claim: Claim) -> None:
        supervisor, now = self.supervisor, self.supervisor.clock()
        live = LiveJob(claim, self.name, now, progressed_at=now, beat_at=now)
        with supervisor.lock:
            self.live = supervisor.live[claim.job.id] = live
        folders = supervisor.claims.store.folders
        task = Task(
            job_id=claim.job.id,
            fence=claim.fence,
            engine=claim.job.engine,
            request=claim.job.request,
            folder=folders.path(claim.job.id),
            output=folders.attempt(claim.job.id, claim.fence),
        )
        try:
            self._settle(self._watch(live, task))
        finally:
            with supervisor.lock:
                self.live = None
                supervisor.live.pop(claim.job.id, None)

    def _watch(self, live: LiveJob, task: Task) -> Callable[[], None]:
        """Hands a job to the worker, takes its reports, and returns what settles it."""
        claim, claims, worker = live.claim, self.supervisor.claims, self.worker
        assert worker is not None
        worker.send("make", task)
        if self.supervisor.is_stopping or self._is_cancelled(claim):
            self.cancel(claim)
        reason = None
        while reason is None:
            try:
                report = worker.receive(WATCH_SECONDS)
            except EOFError:
                reason = worker.describe_end()
                break
            now = self.supervisor.clock()
            if report is not None:
                live.beat_at = self._heard_at = now
                if report[0] in ("done", "failed"):
                    self.warm_engines = report[1]["warm_engines"]
                    return self._outcome(live, report[0], report[1]["outcome"])
                self._take(live, *report)
            if (problem := live.overdue(self.supervisor.patience, now)) is not None:
                reason = f"the worker {problem}"
        self.supervisor.log(f"{claim.job.id}: {reason}; {self.name} is replaced")
        self._kill_worker()
        if self.supervisor.is_stopping or not live.has_started:
            return partial(claims.give_back, claim)
        return partial(claims.lose_worker, claim, reason)

    def _is_cancelled(self, claim: Claim) -> bool:
        """Looks once more: it may have been cancelled before this job was known to be in progress here."""
        try:
            return self.supervisor.claims.current(claim).cancel_requested
        except (LostClaimError, StorageError):
            return False

    def _outcome(self, live: LiveJob, kind: str, outcome: Any) -> Callable[[], None]:
        """Returns what settles a job by the last report of its worker."""
        claim, claims = live.claim, self.supervisor.claims
        if kind == "done":
            return partial(claims.complete, claim, outcome)
        error: JobError = outcome
        if error.code == CANCELLED and self.supervisor.is_stopping:
            return partial(claims.give_back, claim)
        if error.code in _CODES_OF_STORAGE and (problem := self.supervisor.storage_problem()):
            self.supervisor.log(f"{claim.job.id}: {error.message} It waits: {problem}")
            return partial(claims.give_back, claim)
        return partial(claims.fail, claim, error)

    def _settle(self, settle: Callable[[], None]) -> None:
        """Records what became of a job; a disk that refuses it is tried again, as the result is whole already."""
        while True:
            try:
                settle()
                return
            except LostClaimError as error:
                self.supervisor.log(str(error))
                return
            except StorageError as error:
                self.supervisor.log(f"{error} It is tried again.")
                if self.supervisor.is_stopping:
                    return  # what is on disk is settled when the queue is opened again
                time.sleep(IDLE_SECONDS)

    def _take_beat(self, kind: str, data: Any) -> None:
        if kind == "beat":
            self.device_bytes = data

    def _take(self, live: LiveJob, kind: str, data: Any) -> None:
        """Takes a report on the way."""
        if kind == "beat":
            self._take_beat(kind, data)
            return
        live.progressed_at = self.supervisor.clock()
        if kind == "start":
            live.has_started = True
        elif kind == "plan":
            live.plan = data
        elif kind == "progress":
            live.progress, live.is_loading = data, False
            self._publish(live, PROGRESS, live.report)
        elif kind == "load":
            live.is_loading = data
            if data or live.progress:  # else there is no stage to come back to
                self._publish(live, PROGRESS, live.report)
        elif kind == "notice":
            live.notices.append(data)
            self._publish(live, NOTICE, {"message": data})
        elif kind == "preview":
            live.preview = data
            self._publish(live, PREVIEW, {})

    def _publish(self, live: LiveJob, kind: str, data: Mapping[str, Any]) -> None:
        job, table = live.claim.job, self.supervisor.claims.store.table
        with table.lock:  # so that events come in the order of their numbers
            self.supervisor.events.publish(Event(table.next_seq(), kind, job.id, job.owner, data))
