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
    cosine,
    sine,
    tokens,
    x_sample,  # strides in elements, from sample to sample and from token to token
    x_token,
    cosine_sample,
    cosine_token,
    sine_sample,
    sine_token,
    epsilon,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one token of one sample."""
    row = tl.program_id(0)
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < ROW_SIZE
    values = tl.load(x + sample * x_sample + token * x_token + column, inside, 0.0).to(tl.float32)
    values *= inverse_rms(values, epsilon, ROW_SIZE)
    values *= tl.load(weight + column, inside, 0.0).to(tl.float32)
    cosines = tl.load(cosine + sample * cosine_sample + token * cosine_token + column, inside, 0.0).to(tl.float32)
    sines = tl.load(sine + sample * sine_sample + token * sine_token + column, inside, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
    rotated = values * cosines + tl.interleave(-odd, even) * sines
    tl.store(out + row.to(tl.int64) * ROW_SIZE + column, rotated.to(out.dtype.element_ty), inside)


def norm_rope(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, epsilon: float = 1e-5) -> Tensor:
    """See `reference.norm_rope`."""
    samples, tokens, width = x.shape
    output, block = x.new_empty(x.shape), padded_row_size(width)
    strides = [stride for tensor in (x, cosine, sine) for stride in broadcast_strides(tensor)]
    with device_of(x):
        _norm_rope[(samples * tokens,)](
            output,
            x,
            weight,
            cosine,
            sine,
            tokens,
            *strides,
            epsilon,
            ROW_SIZE=width,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return output
