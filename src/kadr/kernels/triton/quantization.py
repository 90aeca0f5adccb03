"""Into products of 8 bits and out of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.reference import LARGEST as LARGEST_OF
from kadr.kernels.triton.common import block_of, device_of, in_eight_bits, warps_for

COLUMNS = 1024  # of a product that a program scales; it takes one row


@triton.jit
def _gelu(x):
    """In its tanh form: x (1 + tanh u) / 2 is x sigmoid(2u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)


@triton.jit
def _quantize(
    codes, factors, x, step, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, LARGEST: tl.constexpr
):
    """One row of x, which begins `step` numbers after the one before."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    numbers = tl.load(x + row * step + column, inside, 0.0).to(tl.float32)
    if GELU:
        numbers = _gelu(numbers)
    coded, factor = in_eight_bits(numbers, codes.dtype.element_ty, LARGEST)
    tl.store(codes + row * WIDTH + column, coded, inside)
    tl.store(factors + row, factor)


@triton.jit
def _rescale(made, sums, rows, columns, bias, row_step, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    numbers = tl.load(sums + row * row_step + column, inside, 0).to(tl.float32)
    numbers *= tl.load(columns + column, inside, 0.0) * tl.load(rows + row)
    if bias is not None:
        numbers += tl.load(bias + column, inside, 0.0).to(tl.float32)
    tl.store(made + row * WIDTH + column, numbers.to(made.dtype.element_ty), inside)


def quantize_rows(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_rows`. x (R, K)."""
    return _quantized(x, kind, gelu=False)


def gelu_quantize(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.gelu_quantize`."""
    return _quantized(x, kind, gelu=True)


def rescale(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.rescale`."""
    count, width = sums.shape
    made = sums.new_empty(sums.shape, dtype=dtype)
    grid = (count, triton.cdiv(width, COLUMNS))
    with device_of(sums):
        _rescale[grid](
            made, sums, rows, columns, bias, sums.stride(0), WIDTH=width, BLOCK=COLUMNS, num_warps=warps_for(COLUMNS)
        )
    return made


def _quantized(x: Tensor, kind: torch.dtype, *, gelu: bool) -> tuple[Tensor, Tensor]:
    count, width = x.shape
    codes, factors = x.new_empty(x.shape, dtype=kind), x.new_empty((count, 1), dtype=torch.float32)
    block = block_of(width)
    with device_of(x):
        _quantize[(count,)](
            codes,
            factors,
            x,
            x.stride(0),
            WIDTH=width,
            BLOCK=block,
            GELU=gelu,
            LARGEST=LARGEST_OF[kind],
            num_warps=warps_for(block),
        )
    return codes, factors
