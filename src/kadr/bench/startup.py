"""From the start of a process to a written file: what someone waits for who types a command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from kadr.bench.cases import STARTUP
from kadr.bench.peak_memory import process_peak
from kadr.bench.runner import Absent, Contender
from kadr.bench.stage_case import PROMPT, Work

LOOK = 0.02  # seconds between looks at a program that runs


class Program:
    """A program that writes a file and ends; called, it runs to its end.

    Args:
        command: its words; the file to write is put behind them.
        environment: on top of this process's own.
        suffix: of the file.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], suffix: str = ".mp4") -> None:
        self.command, self.environment, self.suffix = command, environment, suffix
        self.peak: int | None = None  # bytes: the most that any run took, by the system's account

    def __call__(self) -> None:
        """Run it.

        Raises:
            RuntimeError: it failed, or wrote nothing.
        """
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as talk:
            output = Path(folder) / f"out{self.suffix}"
            process = subprocess.Popen(
                [*self.command, str(output)],
                env={**os.environ, **self.environment, "KADR_CACHE": folder},
                stdout=subprocess.DEVNULL,
                stderr=talk,
            )
            status = self._wait(process)
            if status or not output.exists():
                talk.seek(0)
                lines = talk.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError(f"{' '.join(self.command[:4])} ended with {status}: {lines[-1] if lines else ''}")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Until it ends, with a look at its highest mark now and then.

        What the system says of it afterwards (`ru_maxrss`) counts this process, which it began as a copy of.
        """
        while True:
            try:
                return process.wait(timeout=LOOK)
            except subprocess.TimeoutExpired:
                if (peak := process_peak(process.pid)) is not None:
                    self.peak = max(self.peak or 0, peak)

    def contender(self, name: str, dtype: str, *, own: bool = False, note: str = "") -> Contender:
        return Contender(name=name, run=self, dtype=dtype, own=own, note=note, peak=lambda _: self.peak)


def command(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
    """`kadr generate` as it comes, with the bundled model."""
    if work.stage == STARTUP:
        words = [sys.executable, "-m", "kadr", "generate", PROMPT, "--device", work.device.type, "--output"]
        dtype = str(work.dtype).removeprefix("torch.")
        yield Program(words, {"HF_HUB_OFFLINE": "1"}).contender("kadr auto", dtype, own=True)
