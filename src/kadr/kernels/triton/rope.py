"""Norm over all heads and RoPE of queries and keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.triton.common import broadcast_strides, device_of, inverse_rms, padded_row_size, warps_for


@triton.jit
def _norm_rope(
    out,  # (B, N, D)
    x,
    weight,
    rotation,  # (B or 1, N, D / 2, 2), fp32; None without RoPE
    tokens,
    x_sample,  # strides in elements, from sample to sample and from token to token
    x_token,
    rotation_sample,
    rotation_token,
    epsilon,
    factor,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one token of one sample."""
    row = tl.program_id(0)
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < ROW_SIZE
    values = tl.load(x + sample * x_sample + token * x_token + column, inside, 0.0).to(tl.float32)
    values *= inverse_rms(values, epsilon, ROW_SIZE) * factor
    values *= tl.load(weight + column, inside, 0.0).to(tl.float32)
    if rotation is not None:
        table = tl.load(rotation + sample * rotation_sample + token * rotation_token + column, inside, 0.0)
        cosine, sine = tl.split(tl.reshape(table, (BLOCK // 2, 2)))
        even, odd = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
        values = tl.interleave(even * cosine - odd * sine, odd * cosine + even * sine)
    tl.store(out + row.to(tl.int64) * ROW_SIZE + column, values.to(out.dtype.element_ty), inside)


def norm_rope(x: Tensor, weight: Tensor, rotation: Tensor | None, epsilon: float = 1e-5, factor: float = 1.0) -> Tensor:
    """See `reference.norm_rope`."""
    samples, tokens, width = x.shape
    output, block = x.new_empty(x.shape), padded_row_size(width)
    table = None if rotation is None else rotation.flatten(2)
    strides = [stride for tensor in (x, table) for stride in broadcast_strides(tensor)]
    with device_of(x):
        _norm_rope[(samples * tokens,)](
            output,
            x,
            weight,
            table,
            tokens,
            *strides,
            epsilon,
            factor,
            ROW_SIZE=width,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return output
