"""Options of an engine, checked against the device and the stored weights before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, RequestError
from kadr.kernels import fp8
from kadr.memory.device import can_hold, has_fast_int8
from kadr.quant.weight_formats import (
    AUTO_QUANT,
    FP8,
    FP8_WEIGHT_ONLY,
    INT8,
    INT8_WEIGHT_ONLY,
    NONE,
    check_weight_format,
)
from kadr.spec.weights import can_multiply_stored_fp8, count_stored_types, is_quantized


class WeightFormatChoice(NamedTuple):
    """The quantization scheme of the transformers, and why it is not the requested one; "" where it is."""

    name: str
    notice: str = ""


def resolve_weight_format(
    name: str | None, transformers: Sequence[Checkpoint], device: torch.device
) -> WeightFormatChoice:
    """Returns the quantization scheme of the transformers: the requested one, or the closest this device supports.

    Raises:
        RequestError: there is no such scheme.
        CheckpointError: the weights are quantized already; quantizing them again would lose precision twice.
    """
    scheme = check_weight_format(name or NONE)
    if scheme in (NONE, AUTO_QUANT):
        return WeightFormatChoice(scheme)
    for checkpoint in transformers:
        source = checkpoint.sources["transformer"]
        if is_quantized(source) and not (scheme == FP8 and can_multiply_stored_fp8(source)):
            storage_type = max(count_stored_types(source).items(), key=itemgetter(1))[0]
            raise CheckpointError(
                f"{checkpoint.path} is stored as {storage_type} already; quantizing it to {scheme} would lose "
                "precision twice. Leave --quant out, or use the bf16 file of the model."
            )
    if scheme == FP8 and not fp8.has_fp8_units(device):
        return _fp8_weights_fallback([checkpoint.sources["transformer"] for checkpoint in transformers], device)
    if scheme == FP8_WEIGHT_ONLY and not can_hold(device, torch.float8_e4m3fn):
        notice = f"{device} has no 8-bit floats; {INT8_WEIGHT_ONLY} is used instead: weights in 8-bit integers."
        return WeightFormatChoice(INT8_WEIGHT_ONLY, notice)
    if scheme == INT8 and not has_fast_int8(device):
        on_cpu = "this CPU has no instructions for int8 matmuls (VNNI)"
        notice = (
            f"{on_cpu if device.type == 'cpu' else f'{device} has no int8 matmuls'}, which would make {INT8} slower "
            f"than no quantization; {INT8_WEIGHT_ONLY} is used instead: weights in 8 bits, matmuls in a wider dtype."
        )
        return WeightFormatChoice(INT8_WEIGHT_ONLY, notice)
    return WeightFormatChoice(scheme)


def _fp8_weights_fallback(sources: Sequence[Source], device: torch.device) -> WeightFormatChoice:
    """Returns the closest scheme on a device without fp8 matmuls."""
    closest = FP8_WEIGHT_ONLY if can_hold(device, torch.float8_e4m3fn) else INT8_WEIGHT_ONLY
    notice = (
        f"{device} has no fp8 matmuls (GPUs since Ada and Hopper have them); {closest} is used instead: weights in 8 "
        "bits, matmuls in a wider dtype."
    )
    return WeightFormatChoice(NONE if any(is_quantized(source) for source in sources) else closest, notice)


def refuse_merging(transformers: Sequence[Checkpoint]) -> None:
    """Refuses to merge LoRAs into quantized weights, which would be rounded a second time.

    Raises:
        CheckpointError: some weights are quantized.
    """
    for checkpoint in transformers:
        source = checkpoint.sources["transformer"]
        if is_quantized(source):
            storage_type = max(count_stored_types(source).items(), key=itemgetter(1))[0]
            raise CheckpointError(
                f"{checkpoint.path} is stored as {storage_type}; merging a LoRA would round its weights a second time. "
                "Leave --merge-loras out: beside the weights a LoRA loses no precision."
            )


def check_compile(requested: bool, device: torch.device) -> bool:
    """Returns whether to compile the transformer's blocks.

    Raises:
        RequestError: the device gains nothing from it.
    """
    if requested and device.type != "cuda":
        raise RequestError(
            f"--compile is for CUDA only: on {device.type} it takes longer than it saves, and weights could not stay "
            "prepacked for the device's kernels. Leave --compile out."
        )
    return requested
