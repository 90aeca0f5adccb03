"""A batch whose process is killed at random moments and run again: no row is lost, and none is made twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kadr.batch.outcome import MANIFEST_FILE
from tests.batch.fake_batch import contents
from tests.jobs.fake_maker import END, START, read_log
from tests.page_commands import ROOT

NUM_ROWS, NUM_KILLS = 50, 5
END_SECONDS = 60.0


def start(file: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts the batch as a process."""
    command = [sys.executable, "-m", "tests.batch.fake_batch", *map(str, (file, out, log))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def kill_after(process: subprocess.Popen[bytes], log: Path, starts: int, seconds: float) -> None:
    """Kills a process so many seconds after its batch has begun so many further rows; or when it has ended."""
    end, before = time.monotonic() + END_SECONDS, len(read_log(log))
    while process.poll() is None and sum(event == START for event, *_ in read_log(log)[before:]) < starts:
        assert time.monotonic() < end, "the batch makes no row"
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_batch_makes_each_row_once(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")  # pytest shows it where the test fails
    file, out, log = tmp_path / "rows.txt", tmp_path / "out", tmp_path / "log"
    file.write_text("".join(f"slow 0.02 {number}\n" for number in range(NUM_ROWS)))
    for _ in range(NUM_KILLS):
        kill_after(start(file, out, log), log, rng.randrange(1, NUM_ROWS // NUM_KILLS), rng.uniform(0, 0.06))
    assert start(file, out, log).wait(END_SECONDS) == 0

    assert sorted(contents(out).values()) == sorted(file.read_text().splitlines())
    lines = [json.loads(line) for line in (out / MANIFEST_FILE).read_text("utf-8").splitlines()]
    assert [(line["row"], line["status"]) for line in lines] == [(n, "completed") for n in range(1, NUM_ROWS + 1)]
    assert sorted(line["path"] for line in lines) == list(contents(out))
    events = read_log(log)
    starts, ends = (sum(event == kind for event, *_ in events) for kind in (START, END))
    assert len({job_id for _, job_id, _, _ in events}) == NUM_ROWS
    # A kill can fall between the maker's last line and the result: that row is made again. No other one is.
    assert NUM_ROWS <= ends <= starts <= NUM_ROWS + NUM_KILLS
