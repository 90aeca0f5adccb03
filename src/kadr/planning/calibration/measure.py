"""Measures a machine: everything that a `Calibration` has, in less than a minute on two cores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kadr.planning.calibration.calibration import Calibration, Curve, prepack_conv_rate
from kadr.planning.calibration.layers import LayerMeter
from kadr.planning.calibration.rates import RateMeter, measure_startup

Report = Callable[[str], object]


def report_nothing(step: str) -> None:
    """Reports no progress."""


@torch.inference_mode()
def measure_machine(dtype: torch.dtype, device: torch.device, report: Report = report_nothing) -> Calibration:
    """Returns how fast this machine computes in a dtype on a device.

    Args:
        report: called with the name of each step before it.

    Raises:
        Cancelled: the work is cancelled; looked at before each run of a layer.
    """
    layers, rates = LayerMeter(dtype, device), RateMeter(dtype, device)
    report("self-attention")
    attention = layers.attention_curves()
    blocks: dict[str, dict[int, Curve]] = {}
    for kernel in layers.block_kernels():
        report(f"transformer blocks, {kernel} weights")
        blocks[kernel] = layers.block_curves(kernel, attention)
    convolutions: dict[str, dict[int, Curve]] = {}
    measured: dict[str, float] = {}
    for kernel in layers.conv_kernels():
        report(f"convolutions, {kernel}")
        convolutions[kernel], prepack_seconds = layers.conv_curves(kernel)
        if prepack_seconds is not None:
            measured[prepack_conv_rate(kernel)] = prepack_seconds
    for step, task in (
        ("new memory", rates.new_memory),
        ("reading weights", rates.reading),
        ("converting weights", rates.conversions),
        ("quantizing weights", rates.quantizing),
        ("writing an mp4", rates.writing),
        ("start-up", partial(measure_startup, device)),
    ):
        report(step)
        measured |= task()
    return Calibration(blocks=blocks, attention=attention, convolutions=convolutions, rates=measured)
