"""Figures of the server for Prometheus, in a registry of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kadr.jobs.events import JOB, Event
from kadr.jobs.job import STATUSES

if TYPE_CHECKING:
    from kadr.jobs.queue import JobQueue

_SECONDS = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600, 7200)


class Metrics:
    """The figures; `write` brings those of the queue up to date."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "kadr_http_answers", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self._jobs = Gauge("kadr_jobs", "Jobs by status.", ["status"], registry=self.registry)
        self._finished = Counter(
            "kadr_jobs_finished", "Jobs that ended, by outcome.", ["outcome"], registry=self.registry
        )
        self._seconds = Histogram(
            "kadr_job_seconds", "Time from claim to result.", buckets=_SECONDS, registry=self.registry
        )
        self._workers = Gauge("kadr_workers_ready", "Workers that make a job or could.", registry=self.registry)
        self._paused = Gauge("kadr_queue_paused", "1 while the queue is paused.", registry=self.registry)

    def observe(self, event: Event) -> None:
        """Takes an event of the queue into account."""
        if event.kind != JOB or not event.is_outcome:
            return
        job = event.data
        self._finished.labels(job.error.code if job.error else "completed").inc()
        if job.error is None and job.started_at is not None:
            self._seconds.observe(max(0.0, job.finished_at - job.started_at))

    def write(self, queue: JobQueue) -> bytes:
        """Returns all figures in the text format of Prometheus."""
        counts = queue.store.counts()
        for status in STATUSES:
            self._jobs.labels(status).set(counts[status])
        self._workers.set(queue.supervisor.num_ready)
        self._paused.set(queue.store.is_paused)
        return generate_latest(self.registry)
