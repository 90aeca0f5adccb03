"""`kadr --help` is fast and loads no torch."""

import os
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

SOURCES = Path(__file__).parents[2] / "src"
MAX_CPU_SECONDS = 0.4  # from the start of the process to its end


def run_help(*python_flags: str) -> subprocess.CompletedProcess[str]:
    """Runs `kadr --help` in a process of its own, on the source tree rather than an installed copy."""
    return subprocess.run(
        [sys.executable, *python_flags, "-m", "kadr.cli.main", "--help"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_goes_to_stdout() -> None:
    process = run_help()
    assert (process.returncode, process.stderr) == (0, "")
    assert "generate" in process.stdout


def test_help_does_not_load_torch() -> None:
    process = run_help("-X", "importtime")  # stderr: lines of "import time: self | cumulative | module"
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in lines}
    assert process.returncode == 0, process.stderr[-2000:]
    assert "kadr.cli" in loaded, "the import log was not parsed"
    assert "torch" not in loaded


def test_help_answers_in_under_400_milliseconds() -> None:
    """Measures CPU time, because other tests run at the same time."""
    times = []
    for _ in range(5):
        before = getrusage(RUSAGE_CHILDREN)
        process = run_help()
        after = getrusage(RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert process.returncode == 0, process.stderr
    assert min(times) < MAX_CPU_SECONDS, (
        f"the best of {[f'{seconds:.2f} s' for seconds in times]} is over {MAX_CPU_SECONDS} s"
    )
