"""Kernels that were chosen on this machine, as plain data: what a video records, so that it can be repeated.

Which kernel is fastest may change between two measurements, and each rounds differently. So a choice is stored with the
calibration, in the metadata of a video and in a folder of windows, and restored before the same video is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from kadr.kernels import attention, fp8
from kadr.kernels.autotuner import AttentionAutotuner, is_key_for

KernelChoices = Mapping[str, str]  # key of the inputs -> name of the kernel


def record_choices(device: torch.device) -> dict[str, str]:
    """Returns the kernels that this process has chosen on a device; {} on one where nothing is chosen."""
    choices = dict(fp8.selected_matmuls(device))
    for autotuner in _autotuners(device):
        choices |= autotuner.choices()
    return dict(sorted(choices.items()))


def restore_choices(choices: KernelChoices, device: torch.device, *, override: bool = False) -> list[str]:
    """Uses kernels that were chosen before, from now on.

    Args:
        choices: as `record_choices` returned them, here or elsewhere. Those of other kinds of devices are ignored.
        override: also where this process has chosen already.

    Returns:
        The choices that this machine does not have, in words.
    """
    missing = []
    for autotuner in _autotuners(device):
        may_round = autotuner.may_round
        mine = {key: name for key, name in choices.items() if is_key_for(key, device, may_round=may_round)}
        missing += [f"{name} for {key}" for key, name in autotuner.restore(mine, override=override).items()]
    return missing


def forget_choices(device: torch.device) -> None:
    """Drops the choices of attention that this process made or restored: each is made anew at its next use."""
    for autotuner in _autotuners(device):
        autotuner.forget()


def _autotuners(device: torch.device) -> Iterator[AttentionAutotuner]:
    if device.type == "cpu":
        yield from attention.autotuners_for(torch.device("cpu"))
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        yield from attention.autotuners_for(torch.device("cuda", index))
