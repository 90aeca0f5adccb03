"""Options of an engine: checked against the device and the weights before anything is fetched or loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import itemgetter

import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.kernels import fp8
from kadr.memory.device import has_fast_int8
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


def resolve_scheme(name: str | None, transformers: Sequence[Checkpoint], device: torch.device) -> str:
    """How the weights of transformers are to be stored in memory: what was asked for, or what comes near it here.

    Raises:
        RequestError: there is no such scheme.
        CheckpointError: the weights are stored in so few bits already that to round them again would lose twice.
    """
    scheme = check_weight_format(name or NONE)
    if scheme in (NONE, AUTO_QUANT):
        return scheme
    for checkpoint in transformers:
        source = checkpoint.sources["transformer"]
        if is_quantized(source) and not (scheme == FP8 and can_multiply_stored_fp8(source)):
            stored = max(count_stored_types(source).items(), key=itemgetter(1))[0]
            raise CheckpointError(
                f"{checkpoint.path} is stored as {stored} already, and to round it to {scheme} would lose twice. "
                "Leave --quant out, or take the bf16 file of the model."
            )
    if scheme == FP8 and not fp8.has_fp8_units(device):
        return _fp8_weights_fallback([checkpoint.sources["transformer"] for checkpoint in transformers], device)
    if scheme == INT8 and device.type == "cpu" and not has_fast_int8():
        warnings.warn(
            f"this CPU has no instructions for products in 8 bits (VNNI), so {INT8} would be slower than it is now; "
            f"weights are stored in 8 bits and computed with in a wider dtype instead ({INT8_WEIGHT_ONLY}).",
            KadrWarning,
            stacklevel=2,
        )
        return INT8_WEIGHT_ONLY
    return scheme


def _fp8_weights_fallback(sources: Sequence[Source], device: torch.device) -> str:
    """What comes nearest to products in 8-bit floats where there are none."""
    warnings.warn(
        f"{device} does not multiply 8-bit floats (GPUs since Ada and Hopper do): weights are stored in 8 bits and "
        f"computed with in a wider dtype instead ({FP8_WEIGHT_ONLY}).",
        KadrWarning,
        stacklevel=3,
    )
    return NONE if any(is_quantized(source) for source in sources) else FP8_WEIGHT_ONLY


def refuse_merging(transformers: Sequence[Checkpoint]) -> None:
    """Refuse to add LoRAs to weights that are stored in fewer bits: they would have to be rounded again.

    Raises:
        CheckpointError: some are.
    """
    for checkpoint in transformers:
        source = checkpoint.sources["transformer"]
        if is_quantized(source):
            stored = max(count_stored_types(source).items(), key=itemgetter(1))[0]
            raise CheckpointError(
                f"{checkpoint.path} is stored as {stored}, and to merge a LoRA its weights would be rounded a second "
                "time. Leave --merge-loras out: beside the weights it loses nothing."
            )


def check_compile(requested: bool, device: torch.device) -> bool:
    """Whether a transformer's layers are to be compiled.

    Raises:
        RequestError: on a device where that is no gain.
    """
    if requested and device.type != "cuda":
        raise RequestError(
            f"layers are compiled for CUDA alone: on {device.type} it takes longer than it saves, and weights could "
            "not stay in the order of its kernels. Leave --compile out."
        )
    return requested
