"""Calibrates the machine for a model: measures how fast it computes in the model's dtype, and stores that."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from kadr.kernels.choices import record_choices, restore_choices
from kadr.memory.device import trim_heap
from kadr.planning.calibration.measure import Report, measure_machine, report_nothing
from kadr.planning.calibration.storage import load_calibration, store_calibration
from kadr.spec.model import ModelSpec


def calibrate_machine(spec: ModelSpec, report: Report = report_nothing) -> Path:
    """Measures this machine in the dtype and on the device of a model, and returns the file of the calibration.

    Args:
        report: called with the name of each step before it.

    Raises:
        CheckpointError: the file cannot be written.
        Cancelled: the work is cancelled.
    """
    calibration = measure_machine(spec.dtype, spec.device, report)
    gc.collect()
    trim_heap()  # what was measured with
    calibration = replace(calibration, kernels=record_choices(spec.device))
    return store_calibration(calibration, spec.dtype, spec.device)


def restore_calibrated_kernels(spec: ModelSpec) -> None:
    """Uses the kernels that were chosen when the machine was calibrated, where this process has chosen none."""
    if spec.device.type != "cpu" and (calibration := load_calibration(spec.dtype, spec.device)) is not None:
        restore_choices(calibration.kernels, spec.device)
