"""Saves and loads the state of a training. A file is written beside the old one and renamed, so an interrupted run
leaves the last whole state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import read_tensors
from kadr.errors import CheckpointError, RequestError
from kadr.json_reader import parse_json
from kadr.schema import TRAINING_STATE
from kadr.training.settings import CHANGEABLE_ON_RESUME
from kadr.training.trainable_lora import TrainableLoRALinear

EXAMPLES_KEY = "examples"  # in the identity of a training: example names, each with a hash of its content
MATRICES, MOMENTS = ("down", "up"), ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    step: int,
    lora_layers: Mapping[str, TrainableLoRALinear],
    optimizer: torch.optim.AdamW,
    identity: Mapping[str, Any],
) -> None:
    """Writes the matrices, the optimizer's moments and the number of steps done.

    Args:
        identity: settings, model and examples as plain data: a training resumes only with the same.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = _collect_tensors(lora_layers, optimizer)
    metadata = {"kadr_training": json.dumps(TRAINING_STATE.stamp({"step": step, **identity}))}
    write_tensors(path, tensors, dtype=torch.float32, metadata=metadata, fsync=True)


def _collect_tensors(lora_layers: Mapping[str, TrainableLoRALinear], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Returns the matrices and their moments by their names in the file."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers.items():
        for matrix in MATRICES:
            parameter = getattr(layer, matrix)
            tensors[f"{name}.{matrix}"] = parameter
            for moment in MOMENTS:
                tensors[f"{name}.{matrix}.{moment}"] = optimizer.state[parameter][moment]
    return tensors


def check_state(path: Path, identity: Mapping[str, Any], steps: int) -> None:
    """Checks the header of a saved state, if there is one, before anything is computed.

    Args:
        identity: as of `save_state`.
        steps: total steps requested.

    Raises:
        CheckpointError: the state belongs to another training, is of a newer kadr, or is damaged.
        RequestError: the training has already done more steps.
    """
    if not path.is_file():
        return
    header = _header(path)
    _require_same(path, header, identity)
    if header["step"] > steps:
        done = f"{path.parent} holds a training that has done {header['step']} steps"
        raise RequestError(f"{done}, more than the {steps} requested. Raise --steps, or choose another --output.")


def load_state(path: Path, lora_layers: Mapping[str, TrainableLoRALinear], optimizer: torch.optim.AdamW) -> int:
    """Loads a saved state into the matrices and the optimizer, if there is one.

    Returns:
        The number of steps done.

    Raises:
        CheckpointError: the file is of a newer kadr, or damaged.
    """
    if not path.is_file():
        return 0
    step = int(_header(path)["step"])
    try:
        _restore_tensors(read_tensors(path)[0], lora_layers, optimizer, step)
    except KeyError as error:
        raise _unreadable(path, f"it has no tensor {error.args[0]}") from error
    except (ValueError, RuntimeError) as error:  # RuntimeError: another shape
        raise _unreadable(path, error) from error
    return step


def _restore_tensors(
    tensors: Mapping[str, Tensor],
    lora_layers: Mapping[str, TrainableLoRALinear],
    optimizer: torch.optim.AdamW,
    step: int,
) -> None:
    """Copies the matrices and their moments from the tensors of a file.

    Nothing may share memory with the file: Windows does not replace a file that is mapped, and the next state is
    written over it.
    """
    for name, layer in lora_layers.items():
        for matrix in MATRICES:
            parameter = getattr(layer, matrix)
            parameter.data.copy_(tensors[f"{name}.{matrix}"])
            moments = {moment: tensors[f"{name}.{matrix}.{moment}"] for moment in MOMENTS}
            state = {moment: tensor.to(parameter.device, copy=True) for moment, tensor in moments.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}


def _header(path: Path) -> dict[str, Any]:
    try:
        header = parse_json(read_tensors(path)[1]["kadr_training"])
        if not isinstance(header, dict) or not isinstance(header.get("step"), int):
            raise ValueError("its header has no step")
    except KeyError as error:
        raise _unreadable(path, "its header names no training") from error
    except ValueError as error:
        raise _unreadable(path, error) from error
    return TRAINING_STATE.upgrade(header, path)


def _unreadable(path: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as a training state: {error}. Remove it to start again.")


def _require_same(path: Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for name, value in identity.items():
        if name in CHANGEABLE_ON_RESUME or stored.get(name) == value:
            continue
        difference = f"{name} = {stored.get(name)}, not {value}"
        if name == EXAMPLES_KEY:
            difference = f"other clips or captions: {_describe_changes(stored.get(name) or {}, value)}"
        raise CheckpointError(
            f"{path.parent} holds a training with {difference}. Resume with the same, choose another --output, or "
            "remove the folder to start again."
        )


def _describe_changes(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Describes how two folders of clips differ."""
    changes = {
        "missing": [name for name in stored if name not in current],
        "new": [name for name in current if name not in stored],
        "changed": [name for name in current if name in stored and current[name] != stored[name]],
    }
    return ", ".join(f"{_first_and_count(names)} {change}" for change, names in changes.items() if names)


def _first_and_count(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
