"""A training on disk: written beside and renamed, so whatever ends a run leaves the last whole one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kadr.checkpoints.save import write_tensors
from kadr.errors import CheckpointError, RequestError
from kadr.training.settings import CHANGEABLE_ON_RESUME
from kadr.training.trainable_lora import TrainableLoRALinear

EXAMPLES = "clips"  # of what is told: names of clips, with what tells a clip and its caption from others
MATRICES, MOMENTS = ("down", "up"), ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    step: int,
    lora_layers: Mapping[str, TrainableLoRALinear],
    optimizer: torch.optim.AdamW,
    identity: Mapping[str, Any],
) -> None:
    """Write matrices, the optimizer's moments, and how many steps are done.

    Args:
        identity: the settings and the model, as plain data: a training goes on only with the same.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers.items():
        for half in MATRICES:
            parameter = getattr(layer, half)
            tensors[f"{name}.{half}"] = parameter
            for moment in MOMENTS:
                tensors[f"{name}.{half}.{moment}"] = optimizer.state[parameter][moment]
    metadata = {"kadr_training": json.dumps({"step": step, **identity})}
    write_tensors(path, tensors, dtype=torch.float32, metadata=metadata, fsync=True)


def check_state(path: Path, identity: Mapping[str, Any], steps: int) -> None:
    """Look at the header of a training that is to go on, if it is there, before anything is computed.

    Args:
        identity: as of `save_state`.
        steps: that are to be done in all.

    Raises:
        CheckpointError: it is of another training, or damaged.
        RequestError: it has done more steps already.
    """
    if not path.is_file():
        return
    found = _header(path)
    _require_same(path, found, identity)
    if found["step"] > steps:
        raise RequestError(
            f"{path.parent} holds a training that has done {found['step']} steps, and {steps} are asked for. Ask for "
            "as many or more, or give another --output."
        )


def load_state(path: Path, lora_layers: Mapping[str, TrainableLoRALinear], optimizer: torch.optim.AdamW) -> int:
    """Go on from a file, if it is there.

    Returns:
        How many steps are done.

    Raises:
        CheckpointError: it is damaged.
    """
    if not path.is_file():
        return 0
    step = int(_header(path)["step"])
    try:
        with safe_open(path, framework="pt") as file:
            for name, layer in lora_layers.items():
                for half in MATRICES:
                    parameter = getattr(layer, half)
                    parameter.data.copy_(file.get_tensor(f"{name}.{half}"))
                    moments = {moment: file.get_tensor(f"{name}.{half}.{moment}") for moment in MOMENTS}
                    state = {moment: tensor.to(parameter.device) for moment, tensor in moments.items()}
                    optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
    except Exception as error:  # safetensors has one of its own
        raise _unreadable(path, error) from error
    return step


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["kadr_training"])
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise ValueError("its header says no step")
    except Exception as error:  # safetensors has one of its own
        raise _unreadable(path, error) from error
    return found


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as a training: {error}. Remove it to begin anew.")


def _require_same(path: Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for name, value in identity.items():
        if name in CHANGEABLE_ON_RESUME or stored.get(name) == value:
            continue
        what = f"{name} = {stored.get(name)}, and now it is {value}"
        if name == EXAMPLES:
            what = f"other clips or captions: {_describe_changes(stored.get(name) or {}, value)}"
        raise CheckpointError(
            f"{path.parent} holds a training with {what}. Go on with the same, give another --output, or remove the "
            "folder to begin anew."
        )


def _describe_changes(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """How two folders of clips differ, in words."""
    words = {
        "gone": [name for name in stored if name not in current],
        "new": [name for name in current if name not in stored],
        "changed": [name for name in current if name in stored and current[name] != stored[name]],
    }
    return ", ".join(f"{_first_and_count(names)} {word}" for word, names in words.items() if names)


def _first_and_count(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
