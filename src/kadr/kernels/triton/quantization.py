"""Quantization of the inputs of 8-bit matmuls, and rescaling of their sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.reference import MAX_CODES
from kadr.kernels.triton.common import device_of, padded_row_size, quantize_row, warps_for

COLUMNS_PER_PROGRAM = 1024  # of one row that a program rescales


@triton.jit
def _gelu(x):
    """Computes GELU in its tanh form: x (1 + tanh u) / 2 is x sigmoid(2u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)


@triton.jit
def _quantize(
    codes,
    row_scales,
    x,
    row_stride,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    MAX_CODE: tl.constexpr,
):
    """Quantizes one row of x, or its GELU. Rows are `row_stride` elements apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < ROW_SIZE
    values = tl.load(x + row * row_stride + column, inside, 0.0).to(tl.float32)
    if GELU:
        values = _gelu(values)
    row_codes, row_scale = quantize_row(values, codes.dtype.element_ty, MAX_CODE)
    tl.store(codes + row * ROW_SIZE + column, row_codes, inside)
    tl.store(row_scales + row, row_scale)


@triton.jit
def _rescale(out, sums, row_scales, column_scales, bias, row_stride, ROW_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rescales BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ROW_SIZE
    values = tl.load(sums + row * row_stride + column, inside, 0).to(tl.float32)
    values *= tl.load(column_scales + column, inside, 0.0) * tl.load(row_scales + row)
    if bias is not None:
        values += tl.load(bias + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * ROW_SIZE + column, values.to(out.dtype.element_ty), inside)


def quantize_rows(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_rows`. x (R, K)."""
    return _launch_quantize(x, code_dtype, gelu=False)


def gelu_quantize(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.gelu_quantize`."""
    return _launch_quantize(x, code_dtype, gelu=True)


def rescale(sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.rescale`."""
    rows, width = sums.shape
    output = sums.new_empty(sums.shape, dtype=dtype)
    grid = (rows, triton.cdiv(width, COLUMNS_PER_PROGRAM))
    with device_of(sums):
        _rescale[grid](
            output,
            sums,
            row_scales,
            column_scales,
            bias,
            sums.stride(0),
            ROW_SIZE=width,
            BLOCK=COLUMNS_PER_PROGRAM,
            num_warps=warps_for(COLUMNS_PER_PROGRAM),
        )
    return output


def _launch_quantize(x: Tensor, code_dtype: torch.dtype, *, gelu: bool) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    codes, row_scales = x.new_empty(x.shape, dtype=code_dtype), x.new_empty((rows, 1), dtype=torch.float32)
    block = padded_row_size(width)
    with device_of(x):
        _quantize[(rows,)](
            codes,
            row_scales,
            x,
            x.stride(0),
            ROW_SIZE=width,
            BLOCK=block,
            GELU=gelu,
            MAX_CODE=MAX_CODES[code_dtype],
            num_warps=warps_for(block),
        )
    return codes, row_scales
