"""The command line answers at once: `kadr --help` loads no torch."""

import os
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

SOURCES = Path(__file__).parents[2] / "src"
LIMIT = 0.4  # seconds of a CPU, from the start of the process to its end


def ask_for_help(*python_flags: str) -> subprocess.CompletedProcess[str]:
    """Run `kadr --help` as its own process, on the source tree rather than on an installed copy."""
    return subprocess.run(
        [sys.executable, *python_flags, "-m", "kadr.cli.main", "--help"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_is_data_on_stdout() -> None:
    answer = ask_for_help()
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "generate" in answer.stdout


def test_help_does_not_load_torch() -> None:
    answer = ask_for_help("-X", "importtime")  # stderr: lines of "import time: self | cumulative | module"
    talk = [line for line in answer.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in talk}
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "kadr.cli" in loaded, "the log of imports was not read"
    assert "torch" not in loaded


def test_help_answers_in_under_400_milliseconds() -> None:
    """CPU time: other tests run beside this one, and it waits for nothing else."""
    times = []
    for _ in range(5):
        before = getrusage(RUSAGE_CHILDREN)
        answer = ask_for_help()
        after = getrusage(RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert answer.returncode == 0, answer.stderr
    assert min(times) < LIMIT, f"the best of {[f'{seconds:.2f} s' for seconds in times]} is over {LIMIT} s"
