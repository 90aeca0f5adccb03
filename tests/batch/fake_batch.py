"""A batch without a model: `FakeMaker` makes the videos, as their prompts say. Also a program, for tests that kill it.

python -m tests.batch.fake_batch FILE DIR LOG
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kadr import Request
from kadr.batch.build_row import RowDefaults, read_rows
from kadr.batch.check_rows import RowChecker
from kadr.batch.outcome import RowOutcome
from kadr.batch.progress import BatchProgress
from kadr.batch.row import BatchRow
from kadr.batch.run import Batch, BatchResult
from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import Recipe
from kadr.shapes import Size
from tests.jobs.fake_maker import FakeMaker


@dataclass
class FakeEngine:
    """An engine that resolves what a `RowChecker` needs to know; it refuses 7 frames."""

    prepared: list[Request] = field(default_factory=list)
    spec: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(recipe=Recipe(fps=24.0)))

    def resolve(self, request: Request) -> SimpleNamespace:
        if request.frames == 7:
            raise RequestError("frames is 7; it must be another number.")
        sizes = {"sampled_size": Size(64, 64), "sampled_frames": request.frames or 9}
        return SimpleNamespace(request=request, passes=(None,), controls=(), spans=(), model_evaluations=2, **sizes)

    def prepare(self, request: Request) -> None:
        self.prepared.append(request)


def open_fake_engine(options: Mapping[str, Any]) -> Any:
    """Opens every model but "missing"."""
    if options["model"] == "missing":
        raise CheckpointError("there is no model missing.")
    return FakeEngine()


@dataclass
class Recorder:
    """Records what a batch shows."""

    outcomes: list[RowOutcome] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def show_progress(self, progress: BatchProgress, row: BatchRow | None, stage: Mapping[str, Any]) -> None:
        self.left.append(progress.num_left)
        self.stages += [stage["stage"]] if stage else []

    def show_outcome(self, progress: BatchProgress, outcome: RowOutcome) -> None:
        self.outcomes.append(outcome)

    def show_line(self, line: str) -> None:
        self.lines.append(line)


def fake_batch(file: Path, folder: Path, log: Path, watch: Any = None, *, workers: int = 1, **options: Any) -> Batch:
    """Returns the batch of a file."""
    rows, invalid = read_rows(file, RowDefaults())
    makers = [partial(FakeMaker, log)] * workers
    return Batch(folder, rows, invalid, RowChecker(open_fake_engine), makers, watch or Recorder(), **options)


def statuses(result: BatchResult) -> list[str]:
    return [outcome.status for outcome in result.outcomes]


def contents(folder: Path) -> dict[str, str]:
    """Returns the name and content of each video; `FakeMaker` writes its prompt."""
    return {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.mp4"))}


def main(arguments: Sequence[str]) -> None:
    """Runs a batch to its end."""
    file, folder, log = map(Path, arguments)
    folder.mkdir(exist_ok=True)
    result = fake_batch(file, folder, log).run()
    sys.exit(1 if result.failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
