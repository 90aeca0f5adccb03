"""A worker: a process that makes jobs, and a pipe that nobody waits for, whatever becomes of the process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from kadr.errors import (
    Cancelled,
    CheckpointError,
    KadrError,
    MediaError,
    NonFiniteError,
    PlanError,
    RequestError,
)
from kadr.jobs.engine_maker import Task
from kadr.jobs.worker import WorkerProcess, explain
from tests.jobs.fake_maker import CRASH_CODE, FakeMaker
from tests.jobs.jobs_by_hand import DEMO, wait_until

JOB_ID = "video_" + "0" * 32
IS_POSIX = os.name == "posix"


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts workers with a fake maker, and kills them at the end."""
    workers: list[WorkerProcess] = []

    def start(**arguments: Any) -> WorkerProcess:
        workers.append(WorkerProcess(partial(FakeMaker, tmp_path / "log", **arguments), "worker"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def task(folder: Path, prompt: str, fence: int = 1) -> Task:
    return Task(JOB_ID, fence, DEMO, {"prompt": prompt}, folder, folder / f"output.{fence}")


def receive(worker: WorkerProcess, *kinds: str) -> tuple[str, Any]:
    """Returns the next report of these kinds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if (report := worker.receive(0.1)) is not None and report[0] in kinds:
            return report
    raise AssertionError(f"no {kinds} came")


def caused_by(error: KadrError, number: int) -> KadrError:
    """Returns an error that explains one of the system."""
    error.__cause__ = OSError(number, os.strerror(number))
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Cancelled("cancelled"), "cancelled"),
        (RequestError("frames is 7"), "invalid_request"),
        (MediaError("the image is damaged"), "invalid_media"),
        (PlanError("it does not fit", shortfall=1), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (NonFiniteError("NaN", stage="decode"), "non_finite"),
        (CheckpointError("not a model"), "model_error"),
        (KadrError("no"), "failed"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EACCES, "Permission denied"), "storage"),
        (caused_by(MediaError("out.mp4 could not be written"), errno.ENOSPC), "disk_full"),
        (caused_by(CheckpointError("result.json cannot be written"), errno.ENOSPC), "disk_full"),
        (caused_by(MediaError("out.mp4 could not be written"), errno.EROFS), "storage"),
        (caused_by(MediaError("in.mp4 cannot be read"), errno.ENOENT), "invalid_media"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "out_of_memory"),
        (ZeroDivisionError("division by zero"), "internal"),
        (SystemExit(1), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_error_of_a_maker_has_a_code_and_a_message(error: BaseException, code: str) -> None:
    explained = explain(error)
    assert explained.code == code
    assert explained.message
    assert "\n" not in explained.message


def test_worker_makes_jobs_and_says_what_is_warm(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    worker = start_worker()
    assert receive(worker, "ready") == ("ready", [])
    for fence in (1, 2):
        worker.send("make", task(tmp_path, "make", fence))
        assert receive(worker, "start") == ("start", fence)
        kind, data = receive(worker, "done", "failed")
        assert (kind, data["warm_engines"]) == ("done", ['{"model":"demo"}'])
        assert (tmp_path / f"output.{fence}" / "result.json").exists()
    worker.send("make", task(tmp_path, "refuse", 3))
    kind, data = receive(worker, "done", "failed")
    assert (kind, data["outcome"].code) == ("failed", "invalid_request")


def test_cancelling_stops_only_the_claim_that_is_meant(
    start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    worker = start_worker()
    worker.send("cancel", 1)  # before it is there
    worker.send("make", task(tmp_path, "slow 30", 2))
    receive(worker, "start")
    worker.send("cancel", 1)
    assert all(report is None or report[0] in ("plan", "beat") for report in [worker.receive(0.2) for _ in range(4)])
    worker.send("cancel", 2)
    kind, data = receive(worker, "done", "failed")
    assert (kind, data["outcome"].code) == ("failed", "cancelled")
    assert not (tmp_path / "output.2" / "result.json").exists()


def test_worker_beats_while_it_starts(start_worker: Callable[..., WorkerProcess]) -> None:
    worker = start_worker(start_seconds=2.5)
    kinds = [receive(worker, "beat", "ready")[0] for _ in range(3)]
    assert kinds == ["beat", "beat", "beat"]


def test_end_of_a_worker_is_noticed_and_described(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    worker = start_worker()
    worker.send("make", task(tmp_path, "crash"))
    with pytest.raises(EOFError):
        receive(worker, "done")
    with pytest.raises(EOFError):  # again
        worker.receive(0)
    assert worker.describe_end() == f"the worker ended with exit code {CRASH_CODE}"
    worker.send("cancel", 1)  # nobody reads it
    assert worker.kill()


def test_large_report_arrives(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    worker = start_worker()
    worker.send("make", task(tmp_path, "large 20"))
    assert len(receive(worker, "preview")[1]) == 20 * 10**6


@pytest.mark.skipif(not IS_POSIX, reason="signals of POSIX")
def test_worker_that_dies_while_it_writes_is_gone(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    worker = start_worker()
    receive(worker, "ready")
    worker.send("make", task(tmp_path, "large 500"))
    receive(worker, "plan")
    time.sleep(0.02)  # it is writing the report, which takes longer
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(EOFError):
        receive(worker, "done")
    assert worker.describe_end() == "the worker was killed by signal 9"


@pytest.mark.skipif(not IS_POSIX, reason="signals of POSIX")
def test_nobody_waits_for_a_stopped_worker(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    worker = start_worker()
    receive(worker, "ready")
    os.kill(worker.pid or 0, signal.SIGSTOP)
    began = time.monotonic()
    for fence in range(200):
        worker.send("make", task(tmp_path, "x" * 10**5, fence))  # far more than a pipe takes
    assert time.monotonic() - began < 1
    while worker.receive(0.5) is not None:  # beats of before
        pass
    began = time.monotonic()
    assert worker.kill()
    assert time.monotonic() - began < 2


@pytest.mark.skipif(not IS_POSIX, reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_of_a_terminal_or_service_do_not_end_a_worker(
    start_worker: Callable[..., WorkerProcess], tmp_path: Path, number: str
) -> None:
    worker = start_worker()
    receive(worker, "ready")
    os.kill(worker.pid or 0, getattr(signal, number))
    worker.send("make", task(tmp_path, "make"))
    assert receive(worker, "done", "failed")[0] == "done"


ORPHAN = """
import sys, time
from functools import partial
from pathlib import Path
from kadr.jobs.worker import WorkerProcess
from tests.jobs.fake_maker import FakeMaker
from tests.jobs.test_worker import receive, task

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    worker = WorkerProcess(partial(FakeMaker, folder / "log", float(sys.argv[3])), "worker")
    if sys.argv[2]:
        receive(worker, "ready")
        worker.send("make", task(folder, sys.argv[2]))
        receive(worker, "start")
    print(worker.pid, flush=True)
    if sys.argv[4] == "wait":
        time.sleep(60)
"""


def start_orphan(folder: Path, prompt: str, start_seconds: float = 0.0, then: str = "wait") -> subprocess.Popen[str]:
    """Starts a process that starts a worker and prints its number."""
    script = folder / "orphan.py"
    script.write_text(ORPHAN, "utf-8")
    arguments = [sys.executable, str(script), str(folder), prompt, str(start_seconds), then]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment)


@pytest.mark.skipif(not IS_POSIX, reason="signals of POSIX")
@pytest.mark.parametrize(
    ("prompt", "start_seconds", "is_stopped"),
    [("slow 30", 0, False), ("hang", 0, False), ("", 30, False), ("hang", 0, True)],
    ids=["working", "hanging", "starting", "stopped"],
)
def test_worker_ends_soon_after_its_supervisor_was_killed(
    tmp_path: Path, prompt: str, start_seconds: float, is_stopped: bool
) -> None:
    if is_stopped and sys.platform != "linux":
        pytest.skip("only Linux wakes a stopped process whose parent dies")
    parent = start_orphan(tmp_path, prompt, start_seconds)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    if start_seconds:
        time.sleep(1.0)  # until it waits in the constructor of its maker
    if is_stopped:
        worker.suspend()
        wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, seconds=5.0)


@pytest.mark.skipif(not IS_POSIX, reason="signals of POSIX")
def test_program_that_ends_takes_its_worker_with_it(tmp_path: Path) -> None:
    parent = start_orphan(tmp_path, "hang", then="end")
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    assert parent.wait(timeout=10) == 0
    parent.stdout.close()
    wait_until(lambda: not psutil.pid_exists(number), seconds=5.0)
