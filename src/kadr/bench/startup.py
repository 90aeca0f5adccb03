"""Measures a program from its start to a written file: the wait of someone who types a command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from kadr.bench.cases import STARTUP
from kadr.bench.peak_memory import process_peak_bytes
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import PROMPT, StageCase

POLL_SECONDS = 0.02  # between two readings of a running program's memory


class Program:
    """A program that writes a file and ends. Calling it runs it to its end.

    Args:
        command: its arguments; the path of the file to write is appended.
        environment: variables to add to this process's environment.
        suffix: suffix of the file.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], suffix: str = ".mp4") -> None:
        self.command, self.environment, self.suffix = command, environment, suffix
        self.peak_bytes: int | None = None  # the largest peak of all runs

    def __call__(self) -> None:
        """Runs the program.

        Raises:
            RuntimeError: it failed, or wrote nothing.
        """
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stderr:
            output = Path(folder) / f"out{self.suffix}"
            process = subprocess.Popen(
                [*self.command, str(output)],
                env={**os.environ, **self.environment, "KADR_CACHE": folder},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            status = self._wait(process)
            if status or not output.exists():
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError(f"{' '.join(self.command[:4])} ended with {status}: {lines[-1] if lines else ''}")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Waits for the program to end, and reads its peak memory now and then.

        `ru_maxrss`, read afterwards, would include this process, which the program began as a copy of.
        """
        while True:
            try:
                return process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if (peak := process_peak_bytes(process.pid)) is not None:
                    self.peak_bytes = max(self.peak_bytes or 0, peak)

    def as_contender(self, name: str, dtype: str, *, is_kadr: bool = False, note: str = "") -> Contender:
        return Contender(
            name=name, run=self, dtype=dtype, is_kadr=is_kadr, note=note, measure_peak=lambda _: self.peak_bytes
        )


def startup_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    """Yields `kadr generate` with default settings and the bundled model."""
    if stage_case.stage == STARTUP:
        command = [sys.executable, "-m", "kadr", "generate", PROMPT, "--device", stage_case.device.type, "--output"]
        dtype = str(stage_case.dtype).removeprefix("torch.")
        yield Program(command, {"HF_HUB_OFFLINE": "1"}).as_contender("kadr auto", dtype, is_kadr=True)
