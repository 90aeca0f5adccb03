"""Faults of a queue that a real process serves, each with what must be kept: nothing lost, nothing made twice.

Each case is a function of a `Bench`, and returns what happened. `test_faults.py` runs them in short with a fake maker;
`python -m tests.write_faults` runs them in full with the demo model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.jobs.folders import JobFolders
from kadr.jobs.table import DATABASE_FILE
from kadr.media.clip import ClipReader
from kadr.request.request import Request
from kadr.schema import JOBS_DATABASE_NUMBER
from tests.jobs.fake_maker import END, START, count_lines, read_log
from tests.jobs.fault_server import CRASH_PROMPT, DEATHS, LOADING
from tests.jobs.jobs_by_hand import wait_until

ROOT = Path(__file__).parents[2]
STAGES = (LOADING, "text", "denoise", "decode")
DEMO_REQUEST = Request(
    prompt="a red circle moving right on a black background", size=(64, 64), frames=9, seed=1, steps=8
)
FAKE_REQUEST = {"prompt": "busy 0.15"}
ANSWER_SECONDS = 120.0
WITHOUT_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")  # root obeys permissions too


class ServerGone(Exception):
    """The process died before it answered."""


class Refused(Exception):
    """The process refused a command: the name of its error, and its message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


@dataclass(frozen=True)
class Outcome:
    """A row of the table. times: how often it was done."""

    fault: str
    times: int
    happened: str
    kept: str


@dataclass
class Bench:
    """A folder with a queue, the process that serves it, and what that process has accepted.

    Args:
        maker: "fake" or "demo".
        options: of `fault_server`, for each start.
        prefix: of the command that starts it.
    """

    folder: Path
    maker: str
    draw: random.Random
    options: dict[str, Any] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    accepted: dict[str, str] = field(default_factory=dict)  # id -> key
    deleted: set[str] = field(default_factory=set)
    unmade: dict[str, set[str]] = field(default_factory=dict)  # id -> codes of the errors that it may end with
    _process: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.log, self.queue = self.folder / "log", self.folder / "queue"
        self.folders = JobFolders(self.queue / "jobs")
        self.database = self.queue / DATABASE_FILE

    def start(self, **options: Any) -> None:
        """Starts the process; raises `ServerGone` or `Refused` if it does not serve."""
        assert self._process is None, "it runs"
        arguments = json.dumps({"maker": self.maker, **self.options, **options})
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        with (self.folder / "stderr").open("a", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "tests.jobs.fault_server", str(self.folder), arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        try:
            self._read_answer()
        except Refused:
            self._let_go()
            raise

    def call(self, do: str, **arguments: Any) -> Any:
        """Gives a command, and returns its result; raises `ServerGone` or `Refused`."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            self.wait_for_death()
            raise ServerGone from error
        return self._read_answer()

    def _read_answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.wait_for_death()
            raise ServerGone
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["result"]

    def kill(self) -> None:
        """Kills the process as the system does that runs out of memory."""
        assert self._process is not None
        self._process.kill()
        self.wait_for_death()

    def wait_for_death(self) -> None:
        """Waits until the process is gone, and its worker with it."""
        self._let_go()
        pids = {pid for _, _, _, pid in read_log(self.log)}
        wait_until(lambda: not any(_is_alive(pid) for pid in pids), ANSWER_SECONDS)

    def _let_go(self) -> None:
        """Waits until the process is gone."""
        assert self._process is not None
        self._process.wait(timeout=ANSWER_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        self._process = None

    def close(self) -> None:
        """Stops the process as a signal does, if it runs."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self.wait_for_death()

    def submit(self, request: Mapping[str, Any] | None = None) -> str:
        """Submits a job, and again with the same key where the process died before it answered; returns its id."""
        job_id = f"video_{self.draw.getrandbits(128):032x}"
        default = FAKE_REQUEST if self.maker == "fake" else DEMO_REQUEST.to_json()
        arguments = {"job_id": job_id, "request": request or default, "key": f"key {job_id}"}
        try:
            self.call("submit", **arguments)
        except ServerGone:
            self.start()
            assert self.call("submit", **arguments)["id"] == job_id
        self.accepted[job_id] = arguments["key"]
        return job_id

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Returns the jobs of the queue by their ids."""
        return {job["id"]: job for job in self.call("jobs")}

    def wait(self, *job_ids: str, status: tuple[str, ...] = ("completed", "failed")) -> list[dict[str, Any]]:
        """Waits until jobs have a status, starts the process again where it died meanwhile, and returns them."""

        def have_status() -> bool:
            try:
                jobs = self.jobs()
            except ServerGone:
                self.start()
                return False
            return all(jobs[job_id]["status"] in status for job_id in job_ids)

        wait_until(have_status, ANSWER_SECONDS)
        jobs = self.jobs()
        return [jobs[job_id] for job_id in job_ids]

    def wait_for_start(self, job_id: str) -> None:
        """Waits until a worker makes a job."""
        wait_until(lambda: count_lines(self.log, START)[job_id], ANSWER_SECONDS)

    def log_lines(self) -> list[str]:
        """Returns the lines that the processes wrote for the operator."""
        return (self.folder / "stderr").read_text("utf-8").splitlines()

    def wait_for_line(self, begin: int, *words: str) -> None:
        """Waits for a line for the operator with all these words, after so many others."""
        wait_until(
            lambda: any(all(word in line for word in words) for line in self.log_lines()[begin:]), ANSWER_SECONDS
        )

    def verify(self) -> str:
        """Waits for all jobs and checks that none is lost and none was made twice; returns how many are there."""
        remaining = [job_id for job_id in self.accepted if job_id not in self.deleted]
        jobs = self.wait(*remaining)
        assert {job["id"] for job in self.call("jobs")} == set(remaining) == set(self.folders.job_ids())
        frames = set()
        for job in jobs:
            codes = self.unmade.get(job["id"], set())
            if job["status"] == "failed":
                assert job["error"]["code"] in codes, job["error"]
                continue
            assert None in codes or not codes, f"{job['id']} was made"
            frames.add(self._read_frames(job))
            assert self.folders.attempts(job["id"]) == []
        assert len(frames) <= 1, "a video differs from the others"
        self._check_log()
        whole = sum(job["status"] == "completed" for job in jobs)
        failed = f", {len(jobs) - whole} failed as said" if whole < len(jobs) else ""
        return f"all {len(jobs)} jobs: {whole} videos whole{failed}; none made twice"

    def _read_frames(self, job: Mapping[str, Any]) -> str:
        """Returns a hash of a video's frames."""
        video = self.folders.output(job["id"]) / VIDEO_FILE
        if self.maker == "fake":
            return video.read_text("utf-8")
        frames = list(ClipReader.open(video))
        assert len(frames) == DEMO_REQUEST.frames
        return hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()

    def _check_log(self) -> None:
        """No worker begins a job whose result is on disk."""
        whole: set[str] = set()
        for event, job_id, _, _ in read_log(self.log):
            assert job_id not in whole, f"{job_id} was made twice"
            if event == END:
                whole.add(job_id)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _share(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.items())


def kill_workers(bench: Bench, times: int) -> Outcome:
    """A worker dies in each stage of a video."""
    return _strike_workers(bench, times, "SIGKILL", "worker killed (SIGKILL)")


def stop_workers(bench: Bench, times: int) -> Outcome:
    """A worker stands still in each stage of a video."""
    bench.options["patience"] = {"beat": 1.5, "start": 5.0} if bench.maker == "fake" else {"beat": 5.0, "start": 20.0}
    return _strike_workers(bench, times, "SIGSTOP", "worker stopped (SIGSTOP)")


def _strike_workers(bench: Bench, times: int, signal_name: str, fault: str) -> Outcome:
    bench.start()
    bench.wait(bench.submit())  # the model is warm from here on
    stages, attempts = Counter[str](), Counter[int]()
    for index in range(times):
        stage = STAGES[-1 - index % len(STAGES)]
        stages[stage] += 1
        bench.call("arm", stage=stage, delay=bench.draw.uniform(0.0, 0.1), signal_name=signal_name, target="worker")
        (job,) = bench.wait(bench.submit())
        attempts[job["attempt"]] += 1
    again, at_once = attempts[2], attempts[1]
    happened = f"{_share(stages)}; replaced; {again} made by the next worker, {at_once} were whole already"
    return Outcome(fault, times, happened, bench.verify())


def kill_server(bench: Bench, times: int) -> Outcome:
    """The server dies in each state, and is started again."""
    places = [*DEATHS, *STAGES, "idle", "paused"]
    killed = Counter[str]()
    bench.start()
    bench.wait(bench.submit())
    for index in range(times):
        place = places[index % len(places)]
        bench.close()
        if place in ("idle", "paused"):
            bench.start(is_paused=place == "paused")
            if place == "paused":
                bench.submit()
            bench.kill()
            bench.start()
            bench.call("pause", is_paused=False)
        elif place in STAGES:
            bench.start()
            delay = bench.draw.uniform(0.0, 0.1)
            bench.call("arm", stage=place, delay=delay, signal_name="SIGKILL", target="server")
            bench.wait(bench.submit(), bench.submit())
        else:
            _die_at(bench, place)
        killed[place] += 1
    bench.close()
    bench.start()
    states = f"{len(killed)} states ({'; '.join(killed)}); jobs in progress are made again, whole ones recorded"
    return Outcome("server killed (SIGKILL) and started again", times, states, bench.verify())


def _die_at(bench: Bench, place: str) -> None:
    """Lets the server die at a place of `DEATHS`, and starts it again."""
    if place == "recovering":
        bench.start()
        job_id = bench.submit()
        bench.wait_for_start(job_id)
        bench.kill()
        try:
            bench.start(die_at=place)
        except ServerGone:
            bench.start()
        return
    bench.start(die_at=place, is_paused=place == "cancelled")
    if place == "worker lost":
        bench.call("arm", stage="denoise", delay=0.0, signal_name="SIGKILL", target="worker")
    job_id = bench.submit()
    if place == "cancelled":
        bench.unmade[job_id] = {"cancelled"}
    if place in ("cancelled", "deleted, files left"):
        do = "cancel"
        if place == "deleted, files left":
            do = "delete"
            bench.wait(job_id)
            bench.deleted.add(job_id)
        try:
            bench.call(do, job_id=job_id)
        except ServerGone:
            bench.start()
        bench.call("pause", is_paused=False)
    else:
        bench.wait(job_id)


def start_two_servers(bench: Bench, times: int) -> Outcome:
    """A second server opens the folder of the first."""
    bench.start()
    job_id = bench.submit()
    second = Bench(bench.folder, bench.maker, bench.draw)
    for _ in range(times):
        refusal = _refusal(second.start)
        assert refusal == f"another process serves the queue in {bench.queue}. Stop it, or choose another folder."
    bench.wait(job_id)
    return Outcome(
        "two servers on one folder", times, "the second is refused by name; the first goes on", bench.verify()
    )


def _refusal(action: Callable[[], object]) -> str:
    """Returns the message of an action that a process refuses because of its storage."""
    try:
        action()
    except Refused as error:
        if error.kind == "StorageError":
            return error.message
        raise
    raise AssertionError("it was not refused")


def set_clock_back(bench: Bench, times: int) -> Outcome:
    """The clock goes back an hour while jobs wait and are made, and before a restart."""
    bench.start()
    for index in range(times):
        first, second = bench.submit(), bench.submit()
        bench.wait_for_start(first)
        bench.call("set_clock", offset=-3600.0 * (index + 1))
        third = bench.submit()
        jobs = bench.wait(first, second, third)
        assert [job["number"] for job in jobs] == sorted(job["number"] for job in jobs)
        assert [job["fence"] for job in jobs] == sorted(job["fence"] for job in jobs)
        assert all(job["created_at"] <= job["started_at"] <= job["finished_at"] for job in jobs)
        bench.close()
        bench.start(clock_offset=-3600.0 * (index + 2))
    happened = "the order stays that of submission; no time is before the one it follows"
    return Outcome("clock set back an hour", times, happened, bench.verify())


def submit_a_killer(bench: Bench, times: int) -> Outcome:
    """A job ends every worker that makes it."""
    bench.start()
    for _ in range(times):
        request = (
            {"prompt": CRASH_PROMPT} if bench.maker == "fake" else {**DEMO_REQUEST.to_json(), "prompt": CRASH_PROMPT}
        )
        killer, good = bench.submit(request), bench.submit()
        bench.unmade[killer] = {"worker_lost"}
        bench.wait(killer, good)
        assert count_lines(bench.log, START)[killer] == 2
    happened = "failed with `worker_lost` after two workers; the next job is made"
    return Outcome("a job that kills every worker", times, happened, bench.verify())


def delete_running_database(bench: Bench, times: int) -> Outcome:
    """Somebody deletes the database of a server that runs."""
    bench.start()
    for _ in range(times):
        first, second = bench.submit(), bench.submit()
        bench.wait_for_start(first)
        bench.database.unlink()
        bench.wait(first, second, bench.submit())
        bench.close()
        bench.start()
    happened = "written again from the open file, and said; jobs go on"
    return Outcome("database deleted while the server runs", times, happened, bench.verify())


def delete_database(bench: Bench, times: int) -> Outcome:
    """Somebody deletes the database of a server that was stopped, or killed."""
    for _ in range(times):
        _lose_database(bench, bench.database.unlink)
    happened = "finished videos are found again; what waited or was in progress failed with `database_lost`"
    return Outcome("database deleted while it is down", times, happened, bench.verify())


def damage_database(bench: Bench, times: int) -> Outcome:
    """Bytes of the database are overwritten while the server is down."""

    def overwrite() -> None:
        size = bench.database.stat().st_size
        with bench.database.open("r+b") as file:
            file.seek(bench.draw.randrange(0, size // 4096) * 4096)
            file.write(bench.draw.randbytes(512))

    for index in range(times):
        _lose_database(bench, overwrite)
        assert (bench.queue / f"jobs.damaged-{index + 1}.sqlite").exists()
    happened = "set aside as `jobs.damaged-N.sqlite`, and said; the rest as above"
    return Outcome("database damaged while it is down", times, happened, bench.verify())


def _lose_database(bench: Bench, lose: Callable[[], object]) -> None:
    """Loses the database of a killed server that has a finished job, one in progress and one that waits."""
    bench.close()
    bench.start()
    made = bench.submit()
    bench.wait(made)
    running, waiting = bench.submit(), bench.submit()
    bench.wait_for_start(running)
    bench.kill()
    lose()
    for job_id in (running, waiting):
        bench.unmade[job_id] = {"database_lost"}
    bench.start()
    jobs = bench.jobs()
    assert jobs[made]["status"] == "completed"
    if jobs[running]["status"] == "completed":  # its result was on disk already
        del bench.unmade[running]
    bench.wait(bench.submit())
    bench.close()
    bench.start()


def damage_running_database(bench: Bench, times: int) -> Outcome:
    """Bytes of the database are overwritten while the server runs."""
    aside = 0
    for _ in range(times):
        bench.start()
        made = bench.submit()
        bench.wait(made)
        running, waiting = bench.submit(), bench.submit()
        bench.wait_for_start(running)
        with bench.database.open("r+b") as file:
            file.seek(4096 * bench.draw.randrange(0, bench.database.stat().st_size // 4096))
            file.write(bench.draw.randbytes(4096))
        for do in ("jobs", "storage_problem"):  # they work, or say why not
            with suppress_storage_error():
                bench.call(do)
        bench.kill()
        for job_id in (running, waiting):
            bench.unmade[job_id] = {"database_lost", None}  # type: ignore[arg-type]
        bench.start()
        assert bench.jobs()[made]["status"] == "completed"
        bench.wait(bench.submit())
        aside = len(list(bench.queue.glob("jobs.damaged-*.sqlite")))
        bench.close()
    bench.start()
    happened = f"it goes on or says so; when it is started again, {aside} of {times} are set aside, as above"
    return Outcome("database damaged while the server runs", times, happened, bench.verify())


@contextmanager
def suppress_storage_error() -> Iterator[None]:
    """Lets a command be refused because of its storage, and for no other reason."""
    try:
        yield
    except Refused as error:
        if error.kind != "StorageError":
            raise


def open_newer_database(bench: Bench, times: int) -> Outcome:
    """A newer kadr wrote the database."""
    bench.start()
    bench.wait(bench.submit())
    waiting = bench.submit()
    bench.kill()
    for number in range(1, times + 1):
        with closing(sqlite3.connect(bench.database)) as connection:
            connection.execute(f"PRAGMA user_version = {JOBS_DATABASE_NUMBER + number}")
        before = {path.name: path.read_bytes() for path in bench.queue.glob("jobs.*")}
        assert f"has the schema number {JOBS_DATABASE_NUMBER + number};" in _refusal(bench.start)
        assert {path.name: path.read_bytes() for path in bench.queue.glob("jobs.*")} == before
    with closing(sqlite3.connect(bench.database)) as connection:
        connection.execute(f"PRAGMA user_version = {JOBS_DATABASE_NUMBER}")
    bench.start()
    bench.wait(waiting)
    return Outcome("database of a newer version", times, "refused by its number; not a byte is changed", bench.verify())


def fill_disk(bench: Bench, times: int) -> Outcome:
    """The disk is full while a job is made. The queue lies on a small disk."""
    bench.options["min_free_bytes"] = 2 * 10**6
    bench.start()
    bench.wait(bench.submit())
    for _ in range(times):
        num_lines = len(bench.log_lines())
        running, waiting = bench.submit(), bench.submit()
        bench.wait_for_start(running)
        ballast = bench.queue / "ballast"
        _write_until_full(ballast)
        refusal = _refusal(bench.submit)
        assert "cannot be" in refusal
        bench.wait_for_line(num_lines, running, "It waits: the disk")
        assert "MB free" in bench.call("storage_problem")
        assert all(bench.jobs()[job_id]["status"] in ("queued", "in_progress") for job_id in (running, waiting))
        ballast.unlink()
        bench.wait(running, waiting)
    happened = "new jobs are refused with the reason; the one in progress waits, and is made when there is room"
    return Outcome("disk full", times, happened, bench.verify())


def _write_until_full(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def lock_folder(bench: Bench, times: int) -> Outcome:
    """The folder may not be written, when a server starts and while it runs."""
    bench.prefix = WITHOUT_OVERRIDE if os.geteuid() == 0 else ()
    bench.start()
    bench.wait(bench.submit())
    for _ in range(times):
        num_lines, running = len(bench.log_lines()), bench.submit()
        bench.wait_for_start(running)
        _set_writable(bench.queue, False)
        assert "cannot be written: Permission denied" in _refusal(bench.submit)
        bench.wait_for_line(num_lines, running, "It waits: the folder")
        bench.kill()
        refusal = _refusal(bench.start)
        assert "Make it writable" in refusal or "permissions" in refusal
        _set_writable(bench.queue, True)
        bench.start()
        bench.wait(running)
    happened = "new jobs are refused with the reason; the one in progress waits until the folder can be written"
    return Outcome("read-only folder", times, happened, bench.verify())


def _set_writable(folder: Path, is_writable: bool) -> None:
    """Lets the owner write a folder with all that is in it, or not."""
    paths = [folder, *folder.rglob("*")]
    for path in paths if is_writable else reversed(paths):
        mode = path.stat().st_mode
        path.chmod(mode | 0o200 if is_writable else mode & ~0o222)


def can_drop_capabilities() -> bool:
    """Tells whether a process here can be kept from writing what it may not: root can write everything."""
    if os.geteuid() != 0:
        return True
    if shutil.which(WITHOUT_OVERRIDE[0]) is None:
        return False
    return subprocess.run([*WITHOUT_OVERRIDE, "true"], capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path, megabytes: int = 24) -> Iterator[bool]:
    """Mounts a small disk on a folder; yields false where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "kadr-faults", str(folder)]
    is_mounted = (
        sys.platform == "linux"
        and shutil.which("mount") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


# Case -> how often it is done in full, and in short.
CASES: dict[Callable[[Bench, int], Outcome], tuple[int, int]] = {
    kill_workers: (20, 2),
    stop_workers: (4, 1),
    kill_server: (20, 6),
    submit_a_killer: (2, 1),
    start_two_servers: (3, 1),
    set_clock_back: (2, 1),
    fill_disk: (3, 1),
    lock_folder: (2, 1),
    delete_running_database: (3, 1),
    delete_database: (3, 1),
    damage_database: (5, 1),
    damage_running_database: (5, 1),
    open_newer_database: (3, 1),
}


def run_case(case: Callable[[Bench, int], Outcome], folder: Path, maker: str, times: int, seed: int) -> Outcome | None:
    """Runs a case in a folder that it makes; returns None where it cannot be run here."""
    folder.mkdir()
    with small_disk(folder / "queue") if case is fill_disk else _plain_folder() as can_run:
        if not can_run or (case is lock_folder and not can_drop_capabilities()):
            return None
        bench = Bench(folder, maker, random.Random(seed))
        try:
            return case(bench, times)
        finally:
            bench.close()


@contextmanager
def _plain_folder() -> Iterator[bool]:
    yield True
