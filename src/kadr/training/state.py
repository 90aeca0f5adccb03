"""A training on disk: written beside and renamed, so whatever ends a run leaves the last whole one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kadr.checkpoints.save import write_tensors
from kadr.errors import CheckpointError
from kadr.training.low_rank import Learning
from kadr.training.settings import EXTENDABLE

HALVES, MOMENTS = ("down", "up"), ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path, step: int, layers: Mapping[str, Learning], optimizer: torch.optim.AdamW, told: Mapping[str, Any]
) -> None:
    """Write matrices, the optimizer's moments, and how many steps are done.

    Args:
        told: the settings and the model, as plain data: a training goes on only with the same.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for half in HALVES:
            parameter = getattr(layer, half)
            tensors[f"{name}.{half}"] = parameter
            for moment in MOMENTS:
                tensors[f"{name}.{half}.{moment}"] = optimizer.state[parameter][moment]
    metadata = {"kadr_training": json.dumps({"step": step, **told})}
    write_tensors(path, tensors, dtype=torch.float32, metadata=metadata)


def load_state(
    path: Path, layers: Mapping[str, Learning], optimizer: torch.optim.AdamW, told: Mapping[str, Any]
) -> int:
    """Go on from a file, if it is there.

    Returns:
        How many steps are done.

    Raises:
        CheckpointError: it is of another training, or damaged.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["kadr_training"])
            _require_same(path, found, told)
            for name, layer in layers.items():
                for half in HALVES:
                    parameter = getattr(layer, half)
                    parameter.data.copy_(file.get_tensor(f"{name}.{half}"))
                    moments = {moment: file.get_tensor(f"{name}.{half}.{moment}") for moment in MOMENTS}
                    state = {moment: tensor.to(parameter.device) for moment, tensor in moments.items()}
                    optimizer.state[parameter] = {"step": torch.tensor(float(found["step"])), **state}
    except CheckpointError:
        raise
    except Exception as error:  # safetensors has one of its own
        raise CheckpointError(f"{path} cannot be read as a training: {error}. Remove it to begin anew.") from error
    return int(found["step"])


def _require_same(path: Path, found: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    for name, value in told.items():
        if name not in EXTENDABLE and found.get(name) != value:
            raise CheckpointError(
                f"{path.parent} holds a training with {name} = {found.get(name)}, and now it is {value}. Go on with "
                "the same, give another --output, or remove the folder to begin anew."
            )
