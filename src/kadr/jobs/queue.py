"""`JobQueue`: a queue with its events and its workers, as a server and a batch use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event as Flag
from threading import Thread

from kadr.jobs.claims import JobClaims
from kadr.jobs.events import DELETED, JOB, Event, EventLog
from kadr.jobs.expiry import Retention, delete_expired
from kadr.jobs.job import QueueLimits, StorageError
from kadr.jobs.store import JobStore
from kadr.jobs.supervisor import MIN_FREE_BYTES, Patience, Supervisor
from kadr.jobs.table import JobChange
from kadr.jobs.worker import MakerFactory

MAINTENANCE_SECONDS = 10.0


class JobQueue:
    """Opens a queue in a folder, settles what a crash left open, and runs its workers.

    Args:
        folder: of the queue; made where it is missing.
        makers: what each worker makes videos with, one worker for each.
        limits, retention, patience, min_free_bytes: see `QueueLimits`, `Retention`, `Patience` and `Supervisor`.
        clock: seconds since 1970.
        log: takes lines for the operator.

    Raises:
        StorageError: see `JobTable`.

    Attributes:
        housekeeping: called every ten seconds.
    """

    def __init__(
        self,
        folder: Path,
        makers: Sequence[MakerFactory],
        *,
        limits: QueueLimits | None = None,
        retention: Retention | None = None,
        patience: Patience | None = None,
        min_free_bytes: int = MIN_FREE_BYTES,
        clock: Callable[[], float] = time.time,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.events, self.retention, self._log = EventLog(log=log), retention or Retention(), log
        self._supervisor: Supervisor | None = None
        self.store = JobStore(folder, limits, announce=self._announce, clock=clock)
        self.claims = JobClaims(self.store)
        try:
            self.claims.recover()
        except BaseException:
            self.store.close()
            raise
        self.supervisor = self._supervisor = Supervisor(
            self.claims, self.events, makers, patience=patience, min_free_bytes=min_free_bytes, log=log
        )
        self.housekeeping: list[Callable[[], object]] = []
        self._is_closed = Flag()
        self._maintenance = Thread(target=self._maintain, name="kadr maintenance", daemon=True)

    def start(self) -> None:
        """Starts the workers, and the deletion of what expires."""
        self.supervisor.start()
        self._maintenance.start()

    def set_paused(self, is_paused: bool) -> None:
        """Lets no further job begin, or jobs begin again, and publishes that; see `JobStore.set_paused`.

        Raises:
            StorageError: the folder cannot be written.
        """
        self.store.set_paused(is_paused)
        self.supervisor.announce_state(self.supervisor.storage_problem())

    def close(self) -> None:
        """Stops the workers, puts their jobs back into the queue, and closes it."""
        self._is_closed.set()
        self.supervisor.stop()
        if self._maintenance.is_alive():
            self._maintenance.join()
        self.store.close()

    def _announce(self, change: JobChange) -> None:
        kind, job = DELETED if change.is_deleted else JOB, change.job
        self.events.publish(Event(job.seq, kind, job.id, job.owner, job, change.is_outcome))
        if self._supervisor is not None:
            self._supervisor.on_change(change)

    def _maintain(self) -> None:
        while not self._is_closed.wait(MAINTENANCE_SECONDS):
            try:
                self.supervisor.announce_state(self.supervisor.storage_problem())  # workers look only between jobs
                self.store.table.database.restore_if_deleted()
                self.store.remove_deleted()
                for job_id in delete_expired(self.store, self.retention):
                    self._log(f"{job_id} has expired and was deleted")
                for keep_house in self.housekeeping:
                    keep_house()
            except StorageError as error:
                self._log(str(error))
