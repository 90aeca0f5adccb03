"""Calibrates the machine for a model: measures how fast it computes in the model's dtype, and stores that."""

from __future__ import annotations

from pathlib import Path

from kadr.planning.calibration.measure import Report, measure_machine, report_nothing
from kadr.planning.calibration.storage import store_calibration
from kadr.spec.model import ModelSpec


def calibrate_machine(spec: ModelSpec, report: Report = report_nothing) -> Path:
    """Measures this machine in the dtype and on the device of a model, and returns the file of the calibration.

    Args:
        report: called with the name of each step before it.

    Raises:
        CheckpointError: the file cannot be written.
        Cancelled: the work is cancelled.
    """
    return store_calibration(measure_machine(spec.dtype, spec.device, report), spec.dtype, spec.device)
