"""Matmuls in 8-bit integers through oneDNN on x86 CPUs with VNNI: those of `kernels.int8`.

The weight has the memory order that oneDNN's kernels read, activations are unsigned (those kernels multiply unsigned by
signed), and the scale of the output channels is applied before the sums leave the registers.

Activations are quantized some rows at a time in float32 in one buffer, which stays in cache, together with what comes
before: the norm and modulation of a branch, or a GELU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kadr.kernels.cpu import tokens
from kadr.kernels.reference import MAX_CODES, MIN_ABS_MAX

ZERO_POINT = 128  # code of 0 in unsigned activations
ROUND_UP_FACTOR = 1 + 2.0**-8  # a scale times this, rounded to bfloat16, is no less than the scale
# GELU in its tanh form is x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³): the factors of x and of x³ in 2u.
GELU_LINEAR, GELU_CUBIC = 1.5957691216057308, 0.07135481282553484


class UnsignedRows(NamedTuple):
    """Activations in 8 bits: codes uint8 (R, K) with the zero point 128, and their scales (R, 1)."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, dtype: torch.dtype) -> UnsignedRows:
        """Returns rows that are to be written."""
        return cls(torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, 1, dtype=dtype))


def prepack_weight(weight: Tensor) -> Tensor:
    """Reorders a weight, int8 (O, K), as oneDNN reads it; only `prepacked_linear` takes the result."""
    prepacked: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return prepacked


def quantize_rows_unsigned(x: Tensor, *, gelu: bool = False) -> UnsignedRows:
    """Quantizes x (R, K), or with `gelu` its GELU in the tanh form, to 8 bits per row.

    The scales are in x's dtype, and activations are divided by the scales as rounded to it: nothing is lost when the
    output is scaled in that dtype.
    """
    output = UnsignedRows.empty(len(x), x.shape[1], x.dtype)
    scratch = tokens.slice_buffer(len(x), x.shape[1])
    for _, part, values in tokens.rows_in_float32(x[None]):
        if gelu:
            _gelu_(values, scratch[: len(values)])
        _quantize_into(output, part, values, scratch)
    output.codes.add_(ZERO_POINT)  # wraps around
    return output


def norm_modulate_quantize(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> UnsignedRows:
    """Computes `reference.norm_modulate` of x (B, N, D), then `quantize_rows_unsigned`: rows (B · N, D)."""
    samples, count, width = x.shape
    output, scratch = UnsignedRows.empty(samples * count, width, x.dtype), tokens.slice_buffer(count, width)
    modulation = tokens.Modulation(scale, shift)
    for rows in tokens.rows_in_float32(x):
        first = rows.sample * count
        part = slice(first + rows.part.start, first + rows.part.stop)
        _quantize_into(output, part, modulation.apply(rows, epsilon), scratch)
    output.codes.add_(ZERO_POINT)
    return output


def _quantize_into(output: UnsignedRows, part: slice, values: Tensor, scratch: Tensor) -> None:
    """Writes the signed codes of values, fp32 (R, K), and their scales into a part of `output`."""
    abs_max = torch.abs(values, out=scratch[: len(values)]).amax(dim=-1, keepdim=True).clamp_(min=MIN_ABS_MAX)
    scale, dtype = abs_max.div_(MAX_CODES[torch.int8]), output.scales.dtype
    scale = scale if dtype == torch.float32 else (scale * ROUND_UP_FACTOR).to(dtype)
    output.scales[part] = scale
    # By way of int8: torch converts to uint8 without vector instructions, six times as slowly.
    output.codes.view(torch.int8)[part] = values.mul_(scale.float().reciprocal_()).round_()


def _gelu_(values: Tensor, scratch: Tensor) -> None:
    """Replaces values by their GELU in its tanh form, by a sigmoid, in half the time of a tanh."""
    torch.square(values, out=scratch)
    values.mul_(scratch.mul_(GELU_CUBIC).add_(GELU_LINEAR).mul_(values).sigmoid_())


def prepacked_linear(rows: UnsignedRows, prepacked_weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `kernels.int8.linear` of rows by `quantize_rows_unsigned` and a weight by `prepack_weight`.

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
