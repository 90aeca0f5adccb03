"""Outcomes of the rows of a batch, and the manifest that lists them: results.jsonl, a line for each row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.atomic_write import atomic_file
from kadr.jobs.job import COMPLETED, FAILED, QUEUED, JobError

MANIFEST_FILE = "results.jsonl"
INVALID_ROW = "invalid_row"  # code of a row that cannot be made as it is written


@dataclass(frozen=True, kw_only=True)
class RowOutcome:
    """The outcome of a row.

    Args:
        number, line: see `TableRow`.
        status: "completed", "failed", or "queued" while it is not made.
        path: name of its video in the folder of the batch.
        seed: of its request; None where that cannot be read.
        seconds: that it took.
        error: of a failed one.
        notices: what was degraded on the way.
    """

    number: int
    line: int
    status: str = QUEUED
    path: str | None = None
    seed: int | None = None
    seconds: float | None = None
    error: JobError | None = None
    notices: tuple[str, ...] = ()

    @property
    def is_completed(self) -> bool:
        return self.status == COMPLETED

    @property
    def is_failed(self) -> bool:
        return self.status == FAILED

    def to_json(self) -> dict[str, Any]:
        """Returns the line of the manifest."""
        return {
            "row": self.number,
            "line": self.line,
            "status": self.status,
            "path": self.path,
            "seed": self.seed,
            "seconds": self.seconds,
            "error": self.error and {"code": self.error.code, "message": self.error.message},
            "notices": list(self.notices),
        }


def invalid_row(number: int, line: int, error: Exception) -> RowOutcome:
    """Returns the outcome of a row that cannot be made as it is written."""
    return RowOutcome(number=number, line=line, status=FAILED, error=JobError(INVALID_ROW, str(error)))


def write_manifest(folder: Path, outcomes: Iterable[RowOutcome]) -> Path:
    """Writes the manifest anew, at once, and returns its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = folder / MANIFEST_FILE
    with atomic_file(path) as file:
        file.writelines(json.dumps(outcome.to_json()).encode() + b"\n" for outcome in outcomes)
    return path
