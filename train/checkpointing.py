"""What both trainings need: an average of the weights, a log, and a state to go on from."""

from __future__ import annotations

import copy
import csv
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


class EMA:
    """An exponential average of a model's weights, quick at first so that early weights are forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        mine = dict(self.model.state_dict())
        for name, value in model.state_dict().items():
            mine[name].lerp_(value, 1 - keep)


class CurveLog:
    """A CSV of the curve, with a line printed every so often."""

    def __init__(self, path: Path, columns: tuple[str, ...], every: int = 20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._every, self._lines = every, 0
        if fresh:
            self._writer.writeheader()

    def add(self, **row: float) -> None:
        self._writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        self._lines += 1
        if self._lines % self._every == 0:
            self._file.flush()
            print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def save_state(path: Path, step: int, **objects: Any) -> None:
    """Write the state of every part beside `path`, then rename: a cut leaves the state before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save({"step": step, **{name: part.state_dict() for name, part in objects.items()}}, beside)
    os.replace(beside, path)


def load_state(path: Path, **objects: Any) -> int:
    """Load every part's state from `path`; returns the step to go on from, 0 where there is no state."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in objects.items():
        part.load_state_dict(state[name])
    return int(state["step"])
