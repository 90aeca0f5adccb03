"""Products of 8-bit whole numbers: weights by output channel, activations by token.

`linear` is the definition, and runs everywhere; on CUDA what is around the product goes through `fused`. On x86 CPUs
with VNNI, `prepack_weight`, `quantize_rows_unsigned` and `prepacked_linear` do the same through oneDNN: the weight lies in the order its kernels
read, activations are unsigned (those kernels multiply unsigned by signed), and the scale of the output channels is
applied before the sums leave the registers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import fused, reference
from kadr.kernels.reference import MIN_ABS_MAX

INT8_MAX = 127  # of the 8 bits; -128 is left out, so that the range is symmetric
RESCALE_SLICE_ELEMENTS = 131_072  # products that are scaled at a time: what stays in a core's cache
QUANTIZE_SLICE_ELEMENTS = 262_144  # activations that are quantized at a time, for the same reason; measured
ZERO_POINT = 128  # what stands for 0 in unsigned activations
ROUND_UP_FACTOR = 1 + 2.0**-8  # a scale times this, rounded to bfloat16, is not below the scale
# GELU in its tanh form is x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³): the factors of x and of x³ in 2u.
GELU_LINEAR, GELU_CUBIC = 1.5957691216057308, 0.07135481282553484
MIN_CUDA_ROWS, INT8_ALIGNMENT = 17, 8  # of a product on CUDA (torch._int_mm); and its other sides are multiples of this


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) of any float dtype -> int8 of that shape, and the scale (rows, 1) in fp32 that gives it back.

    Symmetric: the largest magnitude of a row becomes 127.
    """
    return reference.quantize_rows(x, torch.int8)


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with x in 8 bits by row and W in 8 bits by output channel (W8A8), summed exactly in 32 bits.

    Args:
        x: (..., columns) in fp32, bf16 or fp16.
        weight: int8 (outputs, columns).
        weight_scale: fp32 (outputs); see `quantize_rows`.
        bias: (outputs).

    Returns:
        (..., outputs) in x's dtype.
    """
    codes, scales = fused.quantize_rows(x.reshape(-1, x.shape[-1]), torch.int8)
    return scaled_matmul(codes, scales, weight, weight_scale, bias, x.dtype).view(*x.shape[:-1], -1)


def scaled_matmul(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear` of rows that are in 8 bits already: codes (R, K) and what they are multiplied with, fp32 (R, 1)."""
    sums = _int_matmul(codes, weight)
    if codes.device.type != "cpu":
        return fused.rescale(sums, row_scales, weight_scale, bias, dtype)
    made = torch.empty(sums.shape, dtype=dtype)
    step = max(1, RESCALE_SLICE_ELEMENTS // sums.shape[1])
    for start in range(0, len(sums), step):
        piece = slice(start, start + step)
        made[piece] = reference.rescale(sums[piece], row_scales[piece], weight_scale, bias, dtype)
    return made


def _int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 (R, K) and (O, K) -> int32 (R, O)."""
    count = len(codes)
    if codes.is_cuda and count < MIN_CUDA_ROWS:
        codes = F.pad(codes, (0, 0, 0, MIN_CUDA_ROWS - count))
    return torch._int_mm(codes, weight.t())[:count]


def supports_shape(out_features: int, in_features: int) -> bool:
    """Whether a product of these sides can be had on every device."""
    return not out_features % INT8_ALIGNMENT and not in_features % INT8_ALIGNMENT


@cache
def has_int8_units() -> bool:
    """Whether this machine multiplies unsigned by signed 8 bits in oneDNN's kernels. Others are slow."""
    fast = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return bool(fast and torch.backends.mkldnn.is_available())


class UnsignedRows(NamedTuple):
    """Activations in 8 bits: numbers uint8 (R, K), of which 128 is taken, and the scale (R, 1) that gives them back."""

    codes: Tensor
    scales: Tensor


def prepack_weight(weight: Tensor) -> Tensor:
    """weight: int8 (O, K) -> the same in the order that oneDNN reads; of no other use."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def quantize_rows_unsigned(x: Tensor, *, gelu: bool = False) -> UnsignedRows:
    """x (R, K) in 8 bits by row, after its GELU where asked. A few rows at a time, which stay in the cache.

    The scale is a number of x's dtype, and the activations are divided by that very number: nothing is lost when the
    product is scaled in that dtype.
    """
    rows, columns = x.shape
    numbers = torch.empty(rows, columns, dtype=torch.uint8)
    signed, scales = numbers.view(torch.int8), torch.empty(rows, 1, dtype=x.dtype)
    step = max(1, QUANTIZE_SLICE_ELEMENTS // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        wide = _gelu(x[piece].float()) if gelu else x[piece].float()
        scale = wide.abs().amax(dim=-1, keepdim=True).clamp_(min=MIN_ABS_MAX).div_(INT8_MAX)
        scale = scale if x.dtype == torch.float32 else (scale * ROUND_UP_FACTOR).to(x.dtype)
        scales[piece] = scale
        # Through signed numbers: torch converts to unsigned ones one by one, six times as slowly.
        signed[piece] = torch.mul(wide, scale.float().reciprocal_()).round_()
        numbers[piece].add_(ZERO_POINT)  # which wraps around
    return UnsignedRows(numbers, scales)


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, through a sigmoid: half the time of a tanh."""
    return torch.square(x).mul_(GELU_CUBIC).add_(GELU_LINEAR).mul_(x).sigmoid_().mul_(x)


def prepacked_linear(rows: UnsignedRows, prepacked_weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, of activations by `quantize_rows_unsigned` and a weight by `prepack_weight` -> (R, O) in the dtype of the rows' scale."""
    dtype = rows.scales.dtype
    zeros = _zero_points(len(weight_scale))
    product = torch.ops.onednn.qlinear_pointwise
    made: Tensor = product(
        rows.codes, 1.0, ZERO_POINT, prepacked_weight, weight_scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return made.mul_(rows.scales) if bias is None else torch.addcmul(bias, made, rows.scales, out=made)


@cache
def _zero_points(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)
