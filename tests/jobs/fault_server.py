"""A process that serves a queue over its standard input and output, and dies where it is asked to.

    python -m tests.jobs.fault_server FOLDER '{"maker": "fake", "die_at": "published"}'

Each line of its input is a command, `{"do": "submit", ...}`, and each line of its output an answer. When its input
ends, it stops as a server does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

from kadr.cancellation import CancelToken
from kadr.errors import KadrError
from kadr.jobs import claims
from kadr.jobs.claims import JobClaims
from kadr.jobs.engine_maker import EngineMaker, Report, Task
from kadr.jobs.events import JOB, PROGRESS, Event
from kadr.jobs.folders import JobFolders
from kadr.jobs.job import IN_PROGRESS, Job, NewJob
from kadr.jobs.live_job import Patience
from kadr.jobs.queue import JobQueue
from kadr.jobs.store import JobStore
from tests.jobs.fake_maker import CRASH_CODE, START, FakeMaker, append_line, log_results

LOADING = "loading"  # stands for the time between the claim and the first stage
CRASH_PROMPT = "crash"

# Place where the process dies: (owner of a method, its name, whether it dies before or after).
DEATHS: dict[str, tuple[Any, str, str]] = {
    "result on disk": (JobClaims, "complete", "before"),
    "result published, not committed": (JobFolders, "publish", "after"),
    "committed, not announced": (JobClaims, "complete", "after"),
    "a folder without a row": (JobFolders, "sync_media", "after"),
    "accepted, not answered": (JobStore, "submit", "after"),
    "recovering": (claims, "restore_jobs", "before"),
    "claimed": (JobClaims, "claim", "after"),
    "deleted, files left": (JobStore, "_mark_deleted", "after"),
    "cancelled": (JobStore, "cancel", "after"),
    "worker lost": (JobClaims, "lose_worker", "before"),
}


class DemoMaker(EngineMaker):
    """Makes videos with the demo, and logs as `FakeMaker`; the prompt "crash" ends the process."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        log_results(log)
        self._log = log

    def make(self, task: Task, report: Report, token: CancelToken) -> dict[str, Any]:
        append_line(self._log, START, task.output)
        if task.request["prompt"] == CRASH_PROMPT:
            os._exit(CRASH_CODE)
        return super().make(task, report, token)


def die() -> None:
    """Ends the process as the system does that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str) -> None:
    """Patches the queue so that the process dies when it first comes to a place of `DEATHS`."""
    owner, name, moment = DEATHS[place]
    method = getattr(owner, name)

    def call_and_die(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            die()
        if (result := method(*args, **kwargs)) is not None or name != "claim":
            die()
        return result

    setattr(owner, name, call_and_die)


class Service:
    """The commands that a test gives."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.clock_offset = options.get("clock_offset", 0.0)
        maker = {"fake": FakeMaker, "demo": DemoMaker}[options["maker"]]
        self.queue = JobQueue(
            folder / "queue",
            [partial(maker, folder / "log")],
            patience=Patience(**options.get("patience", {})),
            min_free_bytes=options.get("min_free_bytes", 0),
            clock=lambda: time.time() + self.clock_offset,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        self._armed: dict[str, Any] = {}
        self.queue.events.subscribe(self._fire)
        if options.get("is_paused"):
            self.queue.store.set_paused(True)
        self.queue.start()

    def submit(self, job_id: str, request: dict[str, Any], key: str) -> Any:
        new_job = NewJob(request=request, engine={"model": "demo", "device": "cpu", "prompt_cache": False})
        return _plain(self.queue.store.submit(new_job, idempotency_key=key, job_id=job_id))

    def jobs(self) -> Any:
        return [_plain(job) for job in self.queue.store.jobs(limit=1000, newest_first=False).jobs]

    def cancel(self, job_id: str) -> Any:
        return _plain(self.queue.store.cancel(job_id))

    def delete(self, job_id: str) -> None:
        self.queue.store.delete(job_id)

    def pause(self, is_paused: bool) -> None:
        self.queue.store.set_paused(is_paused)

    def set_clock(self, offset: float) -> None:
        self.clock_offset = offset

    def arm(self, stage: str, delay: float, signal_name: str, target: str) -> None:
        """Sends a signal to the worker or to this process, so many seconds after a job comes to a stage."""
        self._armed = {"stage": stage, "delay": delay, "number": getattr(signal, signal_name), "target": target}

    def storage_problem(self) -> str | None:
        return self.queue.supervisor.storage_problem()

    def _fire(self, event: Event) -> None:
        is_loading = event.kind == JOB and event.data.status == IN_PROGRESS
        stage = LOADING if is_loading else event.data["stage"] if event.kind == PROGRESS else None
        if not self._armed or stage != self._armed["stage"]:
            return
        armed, self._armed = self._armed, {}
        timer = Timer(armed["delay"], self._strike, (event.job_id, armed["number"], armed["target"]))
        timer.daemon = True
        timer.start()

    def _strike(self, job_id: str, number: int, target: str) -> None:
        """Sends a signal, if the job that it is meant for is still in progress."""
        worker = self.queue.supervisor.slots[0].worker
        if target == "server":
            os.kill(os.getpid(), number)
        elif worker is not None and job_id in self.queue.supervisor.live:
            os.kill(worker.pid or 0, number)


def _plain(job: Job) -> dict[str, Any]:
    return {**vars(job), "error": job.error and asdict(job.error)}


def answer(service: Service, line: str) -> dict[str, Any]:
    """Does what a line says, and returns the answer."""
    arguments = json.loads(line)
    command: Callable[..., Any] = getattr(service, arguments.pop("do"))
    try:
        return {"result": command(**arguments)}
    except KadrError as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    if options.get("die_at"):
        die_at(options["die_at"])
    try:
        service = Service(folder, options)
    except KadrError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
        sys.exit(1)
    print(json.dumps({"result": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(service, line)), flush=True)
    service.queue.close()


if __name__ == "__main__":
    main()
