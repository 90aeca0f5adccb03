"""The edges between a transformer's branches: the end of one, the entry of the next."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.reference import MAX_CODES as LARGEST_OF
from kadr.kernels.triton.common import (
    broadcast_strides,
    device_of,
    inverse_rms,
    padded_row_size,
    quantize_row,
    warps_for,
)


@triton.jit
def _gate_norm_modulate(
    residual_out,  # (B, N, D), x + gate * branch; None where there is no branch
    modulated_out,  # (B, N, D), its norm, bent, or the codes of that; None where nothing begins
    row_scales_out,  # (B * N), None where `entered` is no codes
    x,
    branch,
    gate,
    scale,
    shift,
    tokens,
    x_sample,  # steps: numbers from one sample, or from one token, to the next
    x_token,
    branch_sample,
    branch_token,
    gate_sample,
    gate_token,
    scale_sample,
    scale_token,
    shift_sample,
    shift_token,
    epsilon,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_CODE: tl.constexpr,
):
    """One token of one sample."""
    row = tl.program_id(0)
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < ROW_SIZE
    place = row.to(tl.int64) * ROW_SIZE + column
    numbers = tl.load(x + sample * x_sample + token * x_token + column, inside, 0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + sample * branch_sample + token * branch_token + column, inside, 0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + sample * gate_sample + token * gate_token + column, inside, 0.0).to(tl.float32)
        rounded = (numbers + added).to(residual_out.dtype.element_ty)
        tl.store(residual_out + place, rounded, inside)
        numbers = rounded.to(tl.float32)  # the norm is that of the numbers that were stored
    if modulated_out is not None:
        bent = numbers * inverse_rms(numbers, epsilon, ROW_SIZE)
        bent *= 1.0 + tl.load(scale + sample * scale_sample + token * scale_token + column, inside, 0.0).to(tl.float32)
        bent += tl.load(shift + sample * shift_sample + token * shift_token + column, inside, 0.0).to(tl.float32)
        if row_scales_out is not None:
            codes, factor = quantize_row(bent, modulated_out.dtype.element_ty, MAX_CODE)
            tl.store(modulated_out + place, codes, inside)
            tl.store(row_scales_out + row, factor)
        else:
            tl.store(modulated_out + place, bent.to(modulated_out.dtype.element_ty), inside)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """See `reference.norm_modulate`."""
    entered = x.new_empty(x.shape)
    _launch(x, scale=scale, shift=shift, epsilon=epsilon, modulated_out=entered)
    return entered


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, code_dtype: torch.dtype, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_modulate_quantize`."""
    codes, factors = _empty_codes(x, code_dtype)
    _launch(x, scale=scale, shift=shift, epsilon=epsilon, modulated_out=codes, row_scales_out=factors)
    return codes, factors


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """See `reference.gate_residual`."""
    ended = x.new_empty(x.shape)
    _launch(x, branch=branch, gate=gate, residual_out=ended)
    return ended


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate`."""
    ended, entered = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(
        x,
        branch=branch,
        gate=gate,
        scale=scale,
        shift=shift,
        epsilon=epsilon,
        residual_out=ended,
        modulated_out=entered,
    )
    return ended, entered


def gate_residual_norm_modulate_quantize(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    code_dtype: torch.dtype,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate_quantize`."""
    ended, (codes, factors) = x.new_empty(x.shape), _empty_codes(x, code_dtype)
    _launch(
        x,
        branch=branch,
        gate=gate,
        scale=scale,
        shift=shift,
        epsilon=epsilon,
        residual_out=ended,
        modulated_out=codes,
        row_scales_out=factors,
    )
    return ended, codes, factors


def _empty_codes(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for codes (B, N, D) and their scales (B, N, 1)."""
    return x.new_empty(x.shape, dtype=code_dtype), x.new_empty((*x.shape[:2], 1), dtype=torch.float32)


def _launch(
    x: Tensor,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    epsilon: float = 0.0,
    residual_out: Tensor | None = None,
    modulated_out: Tensor | None = None,
    row_scales_out: Tensor | None = None,
) -> None:
    samples, tokens, width = x.shape
    block = padded_row_size(width)
    largest = 0.0 if row_scales_out is None or modulated_out is None else LARGEST_OF[modulated_out.dtype]
    tensors = (x, branch, gate, scale, shift)
    places = [step for tensor in tensors for step in broadcast_strides(tensor)]
    with device_of(x):
        _gate_norm_modulate[(samples * tokens,)](
            residual_out,
            modulated_out,
            row_scales_out,
            *tensors,
            tokens,
            *places,
            epsilon,
            ROW_SIZE=width,
            BLOCK=block,
            MAX_CODE=largest,
            num_warps=warps_for(block),
        )
