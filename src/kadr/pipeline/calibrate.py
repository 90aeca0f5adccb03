"""Calibrates the machine for a model: measures how fast it computes in the model's dtype, and stores that."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kadr.errors import KadrError
from kadr.kernels.choices import forget_choices, record_choices, restore_choices
from kadr.memory.device import trim_heap
from kadr.planning.calibration.measure import Report, measure_machine, report_nothing
from kadr.planning.calibration.storage import load_kernels, store_calibration, store_kernels
from kadr.spec.model import ModelSpec


def calibrate_machine(spec: ModelSpec, report: Report = report_nothing) -> Path:
    """Measures this machine in the dtype and on the device of a model, and returns the file of the calibration.

    Kernels that are chosen by timing are chosen anew.

    Args:
        report: called with the name of each step before it.

    Raises:
        CheckpointError: the file cannot be written.
        Cancelled: the work is cancelled.
    """
    forget_choices(spec.device)
    calibration = measure_machine(spec.dtype, spec.device, report)
    gc.collect()
    trim_heap()  # what was measured with
    calibration = replace(calibration, kernels=record_choices(spec.device))
    path = store_calibration(calibration, spec.dtype, spec.device)
    store_kernels({}, spec.dtype, spec.device)  # those of first uses are chosen anew
    return path


def restore_calibrated_kernels(spec: ModelSpec) -> None:
    """Uses the kernels that this machine has chosen before, where this process has chosen none."""
    restore_choices(load_kernels(spec.dtype, spec.device), spec.device)


def remember_kernels(spec: ModelSpec) -> None:
    """Stores the kernels that this process has chosen, so that the same request gives the same video next time.

    A cache folder that cannot be written costs that and nothing else.
    """
    if not (chosen := record_choices(spec.device)):
        return
    stored = load_kernels(spec.dtype, spec.device)
    if chosen.keys() - stored.keys():
        with suppress(OSError, RuntimeError, KadrError):
            store_kernels(chosen | stored, spec.dtype, spec.device)
