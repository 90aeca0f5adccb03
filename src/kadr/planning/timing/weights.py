"""Seconds that a component's weights take: to load them, and to dequantize or read them again at each use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.source import Source
from kadr.memory.mapped_files import cached_fraction
from kadr.planning.calibration.calibration import (
    CONVERT,
    MAP,
    PREPACK,
    READ,
    UPLOAD,
    Calibration,
    dequantize_rate,
    prepack_conv_rate,
    quantize_rate,
)
from kadr.planning.placement import AS_STORED, CONVERTED
from kadr.quant.convert import ggml_type_for
from kadr.quant.weight_formats import EIGHT_BIT_FORMATS, FP8, INT8, INT8_WEIGHT_ONLY
from kadr.spec.weights import block_index, is_linear_weight

# Weight formats -> storage type of the weights that are dequantized at each use; products in 8 bits need none.
_STORAGE_TYPES = {INT8: "", FP8: "", INT8_WEIGHT_ONLY: "int8"}


@dataclass(frozen=True)
class WeightSeconds:
    """Seconds that a component's weights take.

    Args:
        load: once, until the module can run.
        per_use: at each use of all blocks: dequantizing, and reading streamed blocks again.
    """

    load: float
    per_use: float


def weight_seconds(
    calibration: Calibration,
    source: Source,
    dtype: torch.dtype,
    weight_format: str,
    *,
    device: torch.device,
    is_streamed: bool = False,
    is_prepacked: bool = False,
    conv_kernel: str = "",
) -> WeightSeconds:
    """Returns the seconds that a component's weights take.

    Args:
        weight_format: see `planning.placement.Placement`.
        is_streamed: blocks are in memory only while they run.
        is_prepacked: linear weights are prepacked after loading.
        conv_kernel: kernel that convolutions are prepacked for; "" for none.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    move = UPLOAD if device.type == "cuda" else MAP
    load, per_use = source.size_bytes * (1 - _cached_fraction(source)) * calibration.rate(READ), 0.0
    for name, info in source.infos.items():
        in_block = block_index(name) is not None
        is_block_weight = in_block and is_linear_weight(name, info)
        if is_block_weight:
            storage_type = _used_type(info, dtype_name, weight_format)
            if storage_type not in ("", dtype_name):
                per_use += info.numel * calibration.rate(dequantize_rate(storage_type))
        if is_streamed and in_block:
            per_use += info.size_bytes * calibration.rate(move)
            continue
        load += info.size_bytes * calibration.rate(move)
        if is_block_weight and weight_format not in (AS_STORED, CONVERTED):
            load += info.numel * calibration.rate(quantize_rate(weight_format))
        elif _is_converted(info, dtype_name, is_kept=is_block_weight and weight_format == AS_STORED):
            load += info.numel * calibration.rate(CONVERT)
        if conv_kernel and len(info.shape) == 5:
            load += info.numel * calibration.rate(prepack_conv_rate(conv_kernel))
        elif is_prepacked and len(info.shape) == 2 and weight_format in (CONVERTED, INT8) and info.ggml_type is None:
            load += info.numel * calibration.rate(PREPACK)
    return WeightSeconds(load, per_use)


def _is_converted(info: TensorInfo, dtype_name: str, *, is_kept: bool) -> bool:
    """Returns whether a tensor gets another dtype when it is loaded."""
    is_block_quantized = info.ggml_type is not None and len(info.shape) == 2
    return not (is_kept or is_block_quantized) and info.storage_type != dtype_name


def _used_type(info: TensorInfo, dtype_name: str, weight_format: str) -> str:
    """Returns the storage type of a block's weight while the block runs; "" for products in 8 bits."""
    if weight_format in _STORAGE_TYPES:
        return _STORAGE_TYPES[weight_format]
    if weight_format in EIGHT_BIT_FORMATS:
        return "float8_e4m3fn"
    if weight_format not in (AS_STORED, CONVERTED):
        return ggml_type_for(weight_format, info.shape[-1]).name
    return info.storage_type if weight_format == AS_STORED or info.ggml_type is not None else dtype_name


def _cached_fraction(source: Source) -> float:
    """Returns how much of a component's files the system has in memory; 1 for files that are yet to be fetched."""
    files = sorted({info.file for info in source.infos.values()})
    if not source.is_on_disk or not files:
        return 1.0
    return sum(map(cached_fraction, files)) / len(files)
