"""log.csv: a row for each step, for spreadsheets."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from kadr.atomic_write import atomic_path
from kadr.errors import CheckpointError, MediaError

LOG_COLUMNS = ("step", "loss", "validation_loss", "seconds")


class TrainingLog:
    """The log of one training. Rows of steps that will be done again are dropped, and rows that cannot be read.

    Args:
        start_step: steps already done.

    Raises:
        MediaError: the file cannot be read or written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path, self.rows = path, list[Mapping[str, str]]()
        try:
            if start_step and path.is_file():
                with path.open(newline="", encoding="utf-8", errors="replace") as file:
                    self.rows = [row for row in csv.DictReader(file) if _is_done(row, start_step)]
            with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, LOG_COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(self.rows)
        except (OSError, csv.Error, CheckpointError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MediaError(f"{path} cannot be used as the log: {reason}. Move it away.") from error

    @property
    def first_validation_loss(self) -> float | None:
        """The first validation loss in the log; None where it is missing."""
        losses = (_parse_finite(row.get("validation_loss")) for row in self.rows)
        return next((loss for loss in losses if loss is not None), None)

    def add(self, step: int, **values: float | None) -> None:
        """Appends a row. Columns without a value stay empty."""
        cells = {name: "" if values.get(name) is None else f"{values[name]:.6g}" for name in LOG_COLUMNS[1:]}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow({"step": step, **cells})


def _is_done(row: Mapping[str, str], start: int) -> bool:
    step = _parse_finite(row.get("step"))
    return step is not None and 0 <= step <= start


def _parse_finite(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
