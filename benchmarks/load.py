"""Loads a server with more videos than it can queue: `make load`, or `python -m benchmarks.load --jobs 200`.

Clients submit videos to a real `kadr serve` on the demo as fast as they are let, and poll them. The worker and the
baseline have one core, the server and the clients the other. In the same run, and at the same moments, each client asks
a route of FastAPI that does nothing. Prints a markdown table and fails if anything was lost, made twice or refused
without a retry time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from kadr.bench.machine import describe_machine
from kadr.bench.text_report import machine_line
from kadr.jobs.engine_maker import EngineMaker, Task
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.request.request import Request
from kadr.shapes import Size
from tests.doc_tables import DOCS, markdown_table, write_table

WORKER_CORE, SERVER_CORE = 0, 1
REQUEST = Request("a red circle moving right on a black background", size=Size(128, 128), frames=25, steps=8)
BODY = {"prompt": REQUEST.prompt, "size": "128x128", "frames": 25, "steps": 8}
MAX_QUEUED = 16
POLL_SECONDS, MAX_WAIT_SECONDS = 0.25, 1.0
COLUMNS = ("measured", "figure", "bar")
STARTS = 5  # of the server, for the time until it is ready
MAX_IDLE_SECONDS = 2.0  # of a connection: servers close it after five
MEMORY_FROM = 10  # jobs, after which memory should not grow

_BARE_APP = """
import socket, uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.post("/")
async def nothing(body: dict) -> dict:
    return {"ok": True}
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
listener.bind(("127.0.0.1", 0))
print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])
"""


@dataclass
class Tally:
    """The answers that clients got. Seconds of each; ids of accepted videos; refusals by whether they named a time."""

    submit_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    refusals: Counter[bool] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    finished: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """A connection that stays open."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        self._used_at = time.monotonic()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any, float, http.client.HTTPMessage]:
        """Returns status, body, seconds and headers of an answer."""
        if time.monotonic() - self._used_at > MAX_IDLE_SECONDS:
            self._connection.close()
        if self._connection.sock is None:
            self._connection.connect()  # as HTTP clients do: a body must not wait 40 ms for the head's ACK
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter()
        content = None if body is None else json.dumps(body)
        self._connection.request(method, path, content, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        seconds, self._used_at = time.perf_counter() - began, time.monotonic()
        return answer.status, json.loads(text or b"null"), seconds, answer.headers


def run_client(server: str, bare: str, jobs: Iterator[int], tally: Tally, on_finished: Callable[[], object]) -> None:
    """Submits videos, one after the other, and waits for each."""
    to_server, to_bare = Client(server), Client(bare)
    for _ in jobs:
        job_id = submit(to_server, to_bare, tally)
        while True:
            status = to_server.ask("GET", f"/v1/videos/{job_id}")[1]["status"]
            if status in ("completed", "failed"):
                break
            time.sleep(POLL_SECONDS)
        with tally.lock:
            tally.outcomes[status] += 1
            tally.finished.append(job_id)
            on_finished()


def submit(to_server: Client, to_bare: Client, tally: Tally) -> str:
    """Submits a video until it is accepted, and returns its id."""
    while True:
        _, _, bare_seconds, _ = to_bare.ask("POST", "/", BODY)
        status, answer, seconds, headers = to_server.ask("POST", "/v1/videos", BODY)
        with tally.lock:
            tally.bare_seconds.append(bare_seconds)
            tally.submit_seconds.append(seconds)
            if status == 200:
                tally.accepted.append(answer["id"])
                return str(answer["id"])
            if status != 429:
                raise SystemExit(f"the server answered {status}: {answer}")
            retry_after = headers.get("retry-after")
            tally.refusals[retry_after is not None] += 1
        time.sleep(min(MAX_WAIT_SECONDS, float(retry_after or 1)))


@contextmanager
def start(command: list[str], core: int | None, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts a server, on a core or all; yields it and the address that it prints."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        if core is not None:
            pin(process.pid, core)
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(timeout=60)


def pin(pid: int, core: int) -> None:
    """Lets a process with its threads run on one core."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})
    os.sched_setaffinity(pid, {core})


def measure_server(folder: Path, num_jobs: int, num_clients: int) -> tuple[Tally, float, float]:
    """Returns what the clients saw, the seconds that all videos took, and the growth of memory in MB."""
    command = [sys.executable, "-m", "kadr", "serve", "--data", str(folder), "--port", "0"]
    command += ["--max-queued", str(MAX_QUEUED), "--hide-prompts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tally, jobs, memory = Tally(), iter(range(num_jobs)), dict[int, float]()
    with (
        start([sys.executable, "-c", _BARE_APP], SERVER_CORE) as (_, bare),
        start(command, SERVER_CORE, env=environment, stderr=subprocess.DEVNULL) as (process, address),
    ):
        wait_until_ready(address)
        tree = psutil.Process(process.pid).children(recursive=True)
        worker = max(tree, key=lambda child: child.memory_info().rss)
        pin(worker.pid, WORKER_CORE)
        os.sched_setaffinity(0, {SERVER_CORE})
        measured = (psutil.Process(process.pid), worker)

        def note_memory() -> None:
            if len(tally.finished) in (MEMORY_FROM, num_jobs):
                memory[len(tally.finished)] = sum(item.memory_info().rss for item in measured) / 1e6

        warm_up(address)
        began = time.monotonic()
        arguments = (address, bare, jobs, tally, note_memory)
        clients = [threading.Thread(target=run_client, args=arguments) for _ in range(num_clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.monotonic() - began
    check_nothing_lost(folder, tally, num_jobs)
    return tally, seconds, memory[num_jobs] - memory[MEMORY_FROM]


def measure_starts(folder: Path, rounds: int) -> tuple[float, float]:
    """Returns the median seconds from start to ready, and those of importing torch, measured in turns."""
    ready_seconds, import_seconds = [], []
    for number in range(rounds):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        import_seconds.append(time.monotonic() - began)
        command = [sys.executable, "-m", "kadr", "serve", "--data", str(folder / str(number)), "--port", "0"]
        began = time.monotonic()
        with start(command, None, stderr=subprocess.DEVNULL) as (_, address):
            wait_until_ready(address)
            ready_seconds.append(time.monotonic() - began)
    return median(ready_seconds), median(import_seconds)


def wait_until_ready(address: str) -> None:
    """Waits until the server could make a video."""
    while Client(address).ask("GET", "/health")[0] != 200:
        time.sleep(0.02)


def warm_up(address: str) -> None:
    """Makes one video, which loads the model."""
    client = Client(address)
    job_id = client.ask("POST", "/v1/videos", BODY)[1]["id"]
    while client.ask("GET", f"/v1/videos/{job_id}")[1]["status"] != "completed":
        time.sleep(POLL_SECONDS)


def check_nothing_lost(folder: Path, tally: Tally, num_jobs: int) -> None:
    """Fails unless every accepted video was completed exactly once, and its file is there."""
    assert len(tally.accepted) == len(set(tally.accepted)) == num_jobs, "accepted"
    assert tally.outcomes == {"completed": num_jobs}, tally.outcomes
    assert sorted(tally.finished) == sorted(tally.accepted), "finished"
    assert not tally.refusals[False], "refused without a retry time"
    for job_id in tally.accepted:
        made = [path.name for path in (folder / "jobs" / job_id).iterdir() if path.name.startswith("output")]
        assert made == ["output"], (job_id, made)
        assert (folder / "jobs" / job_id / "output" / "video.mp4").stat().st_size


def measure_loop(folder: Path, num_jobs: int) -> float:
    """Returns the seconds that the same videos take in a plain loop, with their stills, on the worker's core."""
    os.sched_setaffinity(0, {WORKER_CORE})
    torch.set_num_threads(1)
    tune_malloc()
    maker = EngineMaker()

    def make(number: int) -> None:
        output = folder / str(number)
        task = Task("", number, {"model": "demo", "loras": []}, REQUEST.to_json(), folder, output)
        maker.make(task, lambda kind, data: None, None)  # type: ignore[arg-type]

    make(0)
    began = time.monotonic()
    for number in range(1, num_jobs + 1):
        make(number)
    return time.monotonic() - began


def percentile(values: list[float], share: float) -> float:
    """Returns the value that this share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write the table into docs/reference/queue.md")
    parser.add_argument("--loop-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.loop_only:
            print(measure_loop(folder, options.jobs))
            return
        ready_seconds, import_seconds = measure_starts(folder / "starts", STARTS)
        tally, seconds, growth = measure_server(folder / "queue", options.jobs, options.clients)
        loop = [sys.executable, "-m", "benchmarks.load", "--loop-only", "--jobs", str(options.jobs)]
        loop_seconds = float(subprocess.run(loop, check=True, stdout=subprocess.PIPE, text=True).stdout)
    submit_ms, bare_ms = (1000 * percentile(values, 0.99) for values in (tally.submit_seconds, tally.bare_seconds))
    rows = [
        ("start to ready", f"{ready_seconds:.2f} s", ""),
        ("import torch", f"{import_seconds:.2f} s", ""),
        ("ratio of the two", f"{ready_seconds / import_seconds:.1f}", "at most 3"),
        ("videos accepted, each completed once", f"{len(tally.accepted)}", f"{options.jobs}"),
        ("refused with 429 and a retry time", f"{tally.refusals[True]}", ""),
        ("submit, 99th percentile", f"{submit_ms:.1f} ms", ""),
        ("a route of FastAPI that does nothing, 99th percentile", f"{bare_ms:.1f} ms", ""),
        ("ratio of the two", f"{submit_ms / bare_ms:.1f}", "at most 5"),
        ("videos per minute", f"{60 * options.jobs / seconds:.1f}", ""),
        ("the same in a plain loop", f"{60 * options.jobs / loop_seconds:.1f}", ""),
        ("ratio of the two", f"{loop_seconds / seconds:.3f}", "at least 0.95"),
        (f"memory of server and worker, from video {MEMORY_FROM} to the last", f"{growth:+.1f} MB", "at most 20 MB"),
    ]
    machine = machine_line(describe_machine(torch.device("cpu")))
    table = f"{machine}.\n\n{markdown_table(COLUMNS, rows)}"
    print(table)
    if options.write:
        write_table(DOCS / "reference" / "queue.md", "make load", f"\n{table}\n")


if __name__ == "__main__":
    main()
