"""Matmuls in 8-bit integers (W8A8): weights scaled per output channel, activations per token.

`linear` is the definition, and runs everywhere; on CUDA, quantization and rescaling go through `fused`. On x86 CPUs
with VNNI `kernels.cpu.int8` does the same through oneDNN.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import fused, reference

RESCALE_SLICE_ELEMENTS = 131_072  # sums rescaled at a time, so that they stay in a core's cache
MIN_CUDA_ROWS, INT8_ALIGNMENT = 17, 8  # of torch._int_mm on CUDA; its other sides are multiples of the second


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes x (rows, columns) of any float dtype to int8 codes of that shape and fp32 scales (rows, 1).

    Symmetric: the largest magnitude of a row becomes 127.
    """
    return reference.quantize_rows(x, torch.int8)


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x Wᵀ + b with x quantized to int8 per row and W in int8 per output channel (W8A8), summed in int32.

    Args:
        x: (..., in_features) in fp32, bf16 or fp16.
        weight: int8 (out_features, in_features).
        weight_scale: fp32 (out_features); see `quantize_rows`.
        bias: (out_features).

    Returns:
        (..., out_features) in x's dtype.
    """
    codes, scales = fused.quantize_rows(x.reshape(-1, x.shape[-1]), torch.int8)
    return scaled_matmul(codes, scales, weight, weight_scale, bias, x.dtype).view(*x.shape[:-1], -1)


def scaled_matmul(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `linear` of rows that are quantized already: codes (R, K) and their scales, fp32 (R, 1)."""
    sums = _int_matmul(codes, weight)
    if codes.device.type != "cpu":
        return fused.rescale(sums, row_scales, weight_scale, bias, dtype)
    output = torch.empty(sums.shape, dtype=dtype)
    step = max(1, RESCALE_SLICE_ELEMENTS // sums.shape[1])
    for start in range(0, len(sums), step):
        rows = slice(start, start + step)
        output[rows] = reference.rescale(sums[rows], row_scales[rows], weight_scale, bias, dtype)
    return output


def _int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """Multiplies int8 (R, K) by int8 (O, K) transposed -> int32 (R, O)."""
    count = len(codes)
    if codes.is_cuda and count < MIN_CUDA_ROWS:
        codes = F.pad(codes, (0, 0, 0, MIN_CUDA_ROWS - count))
    return torch._int_mm(codes, weight.t())[:count]


def supports_shape(out_features: int, in_features: int) -> bool:
    """Returns whether every device supports a matmul with a weight of this shape."""
    return not out_features % INT8_ALIGNMENT and not in_features % INT8_ALIGNMENT


@cache
def has_int8_units() -> bool:
    """Returns whether this CPU has VNNI or AMX for oneDNN's products of unsigned and signed 8-bit integers.

    On other CPUs they are slow.
    """
    has_units = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has_units and torch.backends.mkldnn.is_available())
