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
from kadr.bench.peak_memory import process_peak_bytes
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import PROMPT, StageCase

POLL_SECONDS = 0.02  # seconds between looks at a program that runs


class Program:
    """A program that writes a file and ends; called, it runs to its end.

    Args:
        command: its words; the file to write is put behind them.
        environment: on top of this process's own.
        suffix: of the file.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], suffix: str = ".mp4") -> None:
        self.command, self.environment, self.suffix = command, environment, suffix
        self.peak_bytes: int | None = None  # bytes: the most that any run took, by the system's account

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
                return process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if (peak := process_peak_bytes(process.pid)) is not None:
                    self.peak_bytes = max(self.peak_bytes or 0, peak)

    def as_contender(self, name: str, dtype: str, *, is_kadr: bool = False, note: str = "") -> Contender:
        return Contender(
            name=name, run=self, dtype=dtype, is_kadr=is_kadr, note=note, measure_peak=lambda _: self.peak_bytes
        )


def startup_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    """`kadr generate` as it comes, with the bundled model."""
    if stage_case.stage == STARTUP:
        words = [sys.executable, "-m", "kadr", "generate", PROMPT, "--device", stage_case.device.type, "--output"]
        dtype = str(stage_case.dtype).removeprefix("torch.")
        yield Program(words, {"HF_HUB_OFFLINE": "1"}).as_contender("kadr auto", dtype, is_kadr=True)
