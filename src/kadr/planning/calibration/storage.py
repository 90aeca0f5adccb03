"""Calibrations on disk: one JSON file for each machine, device, dtype and number of threads.

The file's name is a hash of everything that the measured times depend on. A file that is missing, damaged, of another
machine or of another layout means that this machine is uncalibrated; it is never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kadr.atomic_write import atomic_path
from kadr.cache_home import cache_home
from kadr.errors import CheckpointError
from kadr.json_reader import parse_json
from kadr.kernels import mode
from kadr.kernels.cpu import zen
from kadr.memory.cpu import cpu_model
from kadr.planning.calibration.calibration import Calibration
from kadr.planning.calibration.probe import measure_matmul_rate
from kadr.regular_file import read_text
from kadr.schema import CALIBRATION_NUMBER
from kadr.version import __version__

CALIBRATION_FOLDER, KERNELS_PREFIX = "calibration", "kernels-"
_SCHEMA_KEY, _MACHINE_KEY = "schema", "machine"


def describe_target(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Returns everything that measured times depend on, as plain data."""
    description: dict[str, Any] = {
        "cpu": cpu_model() or platform.processor() or platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": mode.current(),
        "zentorch": zen.version(),
        "torch": torch.__version__,
        "kadr": __version__,
    }
    if device.type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
    return description


def calibration_file(dtype: torch.dtype, device: torch.device) -> Path:
    """Returns the file of this machine's calibration.

    Raises:
        RuntimeError: this user has no home directory.
    """
    described = json.dumps([CALIBRATION_NUMBER, describe_target(dtype, device)], sort_keys=True)
    return cache_home() / CALIBRATION_FOLDER / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"


def load_calibration(dtype: torch.dtype, device: torch.device) -> Calibration | None:
    """Returns the stored calibration of this machine; None if there is none that can be read."""
    try:
        data = parse_json(read_text(calibration_file(dtype, device)))
        if data[_SCHEMA_KEY] != CALIBRATION_NUMBER or data[_MACHINE_KEY] != describe_target(dtype, device):
            return None
        return Calibration.from_json(data)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        return None


def kernels_file(dtype: torch.dtype, device: torch.device) -> Path:
    """Returns the file of the kernels that this machine chose at their first use.

    Raises:
        RuntimeError: this user has no home directory.
    """
    path = calibration_file(dtype, device)
    return path.with_name(f"{KERNELS_PREFIX}{path.name}")


def load_kernels(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Returns the kernels that this machine has chosen: those of its calibration, and others at their first use."""
    chosen: dict[str, str] = {}
    with suppress(OSError, RuntimeError, TypeError, ValueError, AttributeError):
        stored = parse_json(read_text(kernels_file(dtype, device)))
        chosen = {str(key): str(name) for key, name in stored.items()}
    calibration = load_calibration(dtype, device)
    return chosen if calibration is None else chosen | dict(calibration.kernels)


def store_kernels(kernels: Mapping[str, str], dtype: torch.dtype, device: torch.device) -> None:
    """Stores kernels that were chosen at their first use, in place of those that are stored.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: this user has no home directory.
    """
    path = kernels_file(dtype, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dict(kernels), indent=1, sort_keys=True) + "\n", "utf-8")


def current_calibration(dtype: torch.dtype, device: torch.device) -> Calibration:
    """Returns the stored calibration of this machine, else what is assumed of it after one quick measurement."""
    stored = load_calibration(dtype, device)
    return stored or Calibration.from_matmul_rate(measure_matmul_rate(dtype, device))


def store_calibration(calibration: Calibration, dtype: torch.dtype, device: torch.device) -> Path:
    """Stores the calibration of this machine and returns its file.

    Raises:
        CheckpointError: the file cannot be written.
        RuntimeError: this user has no home directory.
    """
    path = calibration_file(dtype, device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} cannot be created: {error.strerror or error}. Set KADR_CACHE to a writable folder."
        ) from error
    data = {
        _SCHEMA_KEY: CALIBRATION_NUMBER,
        _MACHINE_KEY: describe_target(dtype, device),
        **calibration.to_json(),
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    return path
