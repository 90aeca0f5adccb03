"""Matmuls in 8-bit integers (W8A8): weights scaled per output channel, activations per token.

`linear` is the definition, and runs everywhere; on CUDA, quantization and rescaling go through `fused`. On x86 CPUs
with VNNI, `prepack_weight`, `quantize_rows_unsigned` and `prepacked_linear` do the same through oneDNN: the weight has
the memory order that its kernels read, activations are unsigned (those kernels multiply unsigned by signed), and the
scale of the output channels is applied before the sums leave the registers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import fused, reference
from kadr.kernels.reference import MIN_ABS_MAX

INT8_MAX = 127  # -128 is not used, so that the range is symmetric
RESCALE_SLICE_ELEMENTS = 131_072  # sums rescaled at a time, so that they stay in a core's cache
ACTIVATION_SLICE_ELEMENTS = 262_144  # activations quantized at a time, for the same reason; measured
ZERO_POINT = 128  # code of 0 in unsigned activations
ROUND_UP_FACTOR = 1 + 2.0**-8  # a scale times this, rounded to bfloat16, is no less than the scale
# GELU in its tanh form is x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³): the factors of x and of x³ in 2u.
GELU_LINEAR, GELU_CUBIC = 1.5957691216057308, 0.07135481282553484
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


class UnsignedRows(NamedTuple):
    """Activations in 8 bits: codes uint8 (R, K) with the zero point 128, and their scales (R, 1)."""

    codes: Tensor
    scales: Tensor


def prepack_weight(weight: Tensor) -> Tensor:
    """Reorders a weight, int8 (O, K), as oneDNN reads it; only `prepacked_linear` takes the result."""
    prepacked: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return prepacked


def quantize_rows_unsigned(x: Tensor, *, gelu: bool = False) -> UnsignedRows:
    """Quantizes x (R, K), or with `gelu` its GELU, to 8 bits per row, a few rows at a time so that they stay in cache.

    The scales are in x's dtype, and activations are divided by the scales as rounded to it: nothing is lost when the
    output is scaled in that dtype.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    signed_codes, scales = codes.view(torch.int8), torch.empty(rows, 1, dtype=x.dtype)
    step = max(1, ACTIVATION_SLICE_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = _gelu(x[part].float()) if gelu else x[part].float()
        scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=MIN_ABS_MAX).div_(INT8_MAX)
        scale = scale if x.dtype == torch.float32 else (scale * ROUND_UP_FACTOR).to(x.dtype)
        scales[part] = scale
        # By way of int8: torch converts to uint8 without vector instructions, six times as slowly.
        signed_codes[part] = torch.mul(values, scale.float().reciprocal_()).round_()
        codes[part].add_(ZERO_POINT)  # wraps around
    return UnsignedRows(codes, scales)


def _gelu(x: Tensor) -> Tensor:
    """Computes GELU in its tanh form by a sigmoid, in half the time of a tanh."""
    return torch.square(x).mul_(GELU_CUBIC).add_(GELU_LINEAR).mul_(x).sigmoid_().mul_(x)


def prepacked_linear(rows: UnsignedRows, prepacked_weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `linear` of rows by `quantize_rows_unsigned` and a weight by `prepack_weight`.

    Returns:
        (R, O) in the dtype of the rows' scales.
    """
    dtype = rows.scales.dtype
    zeros = _zero_points(len(weight_scale))
    qlinear = torch.ops.onednn.qlinear_pointwise
    output: Tensor = qlinear(
        rows.codes, 1.0, ZERO_POINT, prepacked_weight, weight_scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return output.mul_(rows.scales) if bias is None else torch.addcmul(bias, output, rows.scales, out=output)


@cache
def _zero_points(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)
