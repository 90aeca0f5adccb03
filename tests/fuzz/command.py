"""Runs `kadr` on hostile input, in this process or as the real command, and says what it did that it must not."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from kadr.cli.main import app
from tests.stdin_bytes import stdin_bytes

MAX_LINE, MAX_SECONDS, MAX_BYTES = 500, 10.0, 1_500_000_000
ADDRESS_SPACE = 12 << 30  # torch maps gigabytes that it never touches; what it touches is limited by MAX_BYTES
SOURCES = Path(__file__).parents[2] / "src"
_BUG = ("This is a bug", "Traceback (most recent call last)")
# The peak is VmHWM: ru_maxrss begins at the resident set of the process that started this one.
_RUN_AND_MEASURE = """
import re, resource, time
resource.setrlimit(resource.RLIMIT_AS, ({space}, {space}))
from kadr.__main__ import main
try:
    main()
finally:
    with open({file!r}, "w") as file, open("/proc/self/status") as status:
        print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]), time.process_time(), file=file)
"""


@dataclass(frozen=True)
class Case:
    """One command with the files that it is run among.

    Args:
        args: as after `kadr`; a file of `files` is named by its name, since the command runs in their folder.
        files: name -> bytes.
        environment: variables that are set while it runs.
        stdin: bytes on its stdin.
    """

    args: Sequence[str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""

    def __repr__(self) -> str:
        files = {name: f"{len(data)} bytes" for name, data in self.files.items()}
        environment = dict(self.environment)
        return f"Case(args={list(self.args)!r}, files={files}, environment={environment!r}, stdin={self.stdin[:80]!r})"


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command, its CPU seconds and peak bytes (in process: those it added), and new files.

    Seconds of the CPU, because tests run beside others: a command that only waits is ended by a timeout.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int
    new_files: tuple[str, ...]

    def complaints(self) -> Iterator[str]:
        """Yields what the command must not do, whatever its input."""
        lines = [*self.out.splitlines(), *self.err.splitlines()]
        errors = [line for line in self.err.splitlines() if re.match("error:", line, re.IGNORECASE)]
        if self.code not in (0, 1, 2):
            yield f"exit code {self.code}"
        if any(text in self.err for text in _BUG):
            yield "an unexpected error"
        if len(errors) != (self.code != 0):
            yield f"{len(errors)} error lines with exit code {self.code}"
        if not all(map(str.isprintable, lines)):
            yield "control codes"
        if any(len(line) >= MAX_LINE for line in self.err.splitlines()):
            yield f"a line of {max(map(len, self.err.splitlines()))} characters"
        if self.seconds > MAX_SECONDS:
            yield f"{self.seconds:.1f} seconds"
        if self.peak_bytes > MAX_BYTES:
            yield f"{self.peak_bytes:,} bytes"
        if self.code != 0 and self.new_files:
            yield f"files left: {', '.join(self.new_files)}"


def run_in_process(case: Case) -> Outcome:
    """Runs a case in this process, in a folder of its own."""
    out, err = io.StringIO(), io.StringIO()
    with _folder_of(case) as folder, _environment(case.environment), _working_folder(folder):
        begin, peak_before = time.process_time(), _peak_bytes()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), stdin_bytes(case.stdin):
            code = _exit_code(case.args)
        seconds = time.process_time() - begin
        new_files = _new_files(folder, case)
    gc.collect()  # engines are in cycles; those of hundreds of cases would add up
    return Outcome(code, out.getvalue(), err.getvalue(), seconds, _peak_bytes() - peak_before, new_files)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _exit_code(args: Sequence[str]) -> int:
    try:
        _command()(args=list(args), prog_name="kadr")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@cache
def _command() -> Any:
    """Builds the parser of all verbs once: it takes longer than most refused commands."""
    return typer.main.get_command(app)


def run_command(case: Case) -> Outcome:
    """Runs a case as a process of its own, with a limit on its memory."""
    with _folder_of(case) as folder, TemporaryDirectory() as outside:
        measured_file = Path(outside) / "measured"
        script = _RUN_AND_MEASURE.format(space=ADDRESS_SPACE, file=str(measured_file))
        environment = {**os.environ, "PYTHONPATH": str(SOURCES), **case.environment}
        process = subprocess.run(
            [os.fsencode(part) for part in (sys.executable, "-c", script, *case.args)],
            cwd=folder,
            env=environment,
            input=case.stdin,
            capture_output=True,
            timeout=120,
            check=False,
        )
        peak, seconds = measured_file.read_text().split() if measured_file.exists() else ("0", "0")
        texts = (stream.decode("utf-8", "surrogateescape") for stream in (process.stdout, process.stderr))
        return Outcome(process.returncode, *texts, float(seconds), int(peak), _new_files(folder, case))


@contextlib.contextmanager
def _folder_of(case: Case) -> Iterator[Path]:
    with TemporaryDirectory(prefix="fuzz-") as name:
        for file, data in case.files.items():
            path = Path(name) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(name)


@contextlib.contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _new_files(folder: Path, case: Case) -> tuple[str, ...]:
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return tuple(sorted(paths - {Path(name).as_posix() for name in case.files}))
