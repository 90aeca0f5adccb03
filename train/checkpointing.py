"""Parts of every training: the EMA of the weights, the log of the loss curve, and the state to resume from."""

from __future__ import annotations

import copy
import csv
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


class EMA:
    """Exponential moving average (EMA) of a model's weights; its decay is smaller at first, to forget early weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = dict(self.model.state_dict())
        for name, value in model.state_dict().items():
            averages[name].lerp_(value, 1 - decay)


class CurveLog:
    """CSV file of the loss curve. Prints one row of every `every`."""

    def __init__(self, path: Path, columns: tuple[str, ...], every: int = 20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._every, self._lines = every, 0
        if is_new:
            self._writer.writeheader()

    def add(self, **row: float) -> None:
        self._writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        self._lines += 1
        if self._lines % self._every == 0:
            self._file.flush()
            print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def save_state(path: Path, step: int, **objects: Any) -> None:
    """Saves the state of every object in a temporary file, then renames it: an interruption leaves the last state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save({"step": step, **{name: item.state_dict() for name, item in objects.items()}}, temporary)
    os.replace(temporary, path)


def load_state(path: Path, **objects: Any) -> int:
    """Loads the state of every object from `path`; returns the step to resume from, 0 if there is no state."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, item in objects.items():
        item.load_state_dict(state[name])
    return int(state["step"])
