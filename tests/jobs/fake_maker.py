"""`FakeMaker`: makes videos of a few bytes as their prompts say, well or badly, in a worker process without a model.

    "make"              at once
    "load"              at once, and reports that a model is loaded before and after
    "slow 2.5"          in so many seconds, and looks at the token every 10 ms
    "busy 2.5"          the same, and reports progress every 10 ms
    "hang"              never, and ignores the token; "flood" also reports progress all the time
    "freeze"            never: the process stops itself
    "crash"             never: the process ends. "crash once": at the first attempt
    "crash whole once"  the process ends at the first attempt, when the result is on disk and nobody knows
    "refuse"            never: a RequestError
    "full"              never: the disk is full
    "refuse folder"     never: the folder of the video may not be written
    "large 5"           at once, with a report of so many megabytes

Every start, and every video whose result is on disk, is a line in a log: after that line, nobody may make it again.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kadr.cancellation import CancelToken
from kadr.errors import MediaError, RequestError
from kadr.jobs import worker
from kadr.jobs.engine_maker import VIDEO_FILE, Report, Task
from kadr.jobs.folders import write_result
from kadr.jobs.job import canonical_json

STAGE_SECONDS = {"text": 0.1, "denoise": 1.0, "decode": 0.5}
PLAN = {"stage_seconds": STAGE_SECONDS, "layer_seconds": 0.01, "seconds": 1.6, "peak_bytes": 10**6}
START, END = "start", "made"
CRASH_CODE = 7


@dataclass
class FakeMaker:
    """Makes videos, one at a time.

    Args:
        log: the file that takes a line for each start and each video.
        start_seconds: that it takes before it is ready.
    """

    log: Path
    start_seconds: float = 0.0
    warm_engines: Sequence[str] = field(default=(), init=False)
    device_bytes = 1_000_000

    def __post_init__(self) -> None:
        log_results(self.log)
        time.sleep(self.start_seconds)

    def make(self, task: Task, report: Report, token: CancelToken) -> dict[str, Any]:
        """Does what the prompt says."""
        append_line(self.log, START, task.output)
        self.warm_engines = (canonical_json(task.engine),)
        report("plan", PLAN)
        task.output.mkdir()
        action, *arguments = task.request["prompt"].split()
        is_first = count_lines(self.log, START)[task.job_id] == 1
        _ACTIONS[action](arguments, report, token, is_first)
        (task.output / VIDEO_FILE).write_bytes(task.request["prompt"].encode())
        return {"file": VIDEO_FILE, "fence": task.fence}


def log_results(log: Path) -> None:
    """Lets this process, a worker, append a line for each result that it has written."""

    def write_and_log(folder: Path, result: Mapping[str, Any]) -> None:
        write_result(folder, result)
        append_line(log, END, folder)

    worker.write_result = write_and_log


def append_line(log: Path, event: str, output: Path) -> None:
    """Appends a line to a log. output: the folder that is written, whose name ends in the fence."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{event} {output.parent.name} {output.name.rpartition('.')[2]} {os.getpid()}\n")


def read_log(log: Path) -> list[tuple[str, str, int, int]]:
    """Returns the lines of a log: event, id of the job, fence, number of the process."""
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    return [(event, job_id, int(fence), int(pid)) for event, job_id, fence, pid in map(str.split, lines)]


def count_lines(log: Path, event: str) -> Counter[str]:
    """Returns id -> number of lines of an event."""
    return Counter(job_id for kind, job_id, _, _ in read_log(log) if kind == event)


def report_step(report: Report, stage: str, step: int, of: int) -> None:
    """Reports progress, as a model does."""
    report("progress", {"stage": stage, "step": step, "of": of, "sigma": None, "eta": None, "window": None})


def _make(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    report_step(report, "decode", 1, 1)


def _load(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    for is_loading in (True, False):
        report("load", is_loading)
    _make(arguments, report, token, is_first)


def _slow(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    end = time.monotonic() + float(arguments[0])
    while time.monotonic() < end:
        token.check()
        time.sleep(0.01)


def _busy(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    steps = int(float(arguments[0]) / 0.01 / len(STAGE_SECONDS))
    for stage in STAGE_SECONDS:
        for step in range(steps):
            token.check()
            report_step(report, stage, step, steps)
            time.sleep(0.01)


def _hang(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    time.sleep(3600)


def _flood(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    while True:
        report_step(report, "denoise", 1, 2)
        time.sleep(0.01)


def _freeze(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _crash(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    if "once" in arguments and not is_first:
        return
    if "whole" not in arguments:
        os._exit(CRASH_CODE)

    def write_and_exit(folder: Path, result: Mapping[str, Any]) -> None:
        write_result(folder, result)
        os._exit(CRASH_CODE)

    worker.write_result = write_and_exit  # of this process, which ends by it


def _refuse(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    if "folder" in arguments:
        raise MediaError("the folder output.1 may not be written to by this user. Choose another.")
    raise RequestError("frames is 7; it must be 8k+1.")


def _full(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    raise MediaError("video.mp4 could not be written: No space left on device.") from full


def _large(arguments: list[str], report: Report, token: CancelToken, is_first: bool) -> None:
    report("preview", bytes(int(float(arguments[0]) * 10**6)))


_ACTIONS: dict[str, Callable[[list[str], Report, CancelToken, bool], None]] = {
    "make": _make,
    "load": _load,
    "slow": _slow,
    "busy": _busy,
    "hang": _hang,
    "flood": _flood,
    "freeze": _freeze,
    "crash": _crash,
    "refuse": _refuse,
    "full": _full,
    "large": _large,
}
