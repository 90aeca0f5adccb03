"""adaLN between a transformer's branches: the gated residual of one, the modulated norm of the next."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.reference import MAX_CODES
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
    residual_out,  # (B, N, D), x + gate * branch; None without a branch
    modulated_out,  # (B, N, D), its norm, modulated, or the codes of that; None where no branch begins
    row_scales_out,  # (B * N), None where `modulated_out` is not quantized
    x,
    branch,
    gate,
    scale,
    shift,
    tokens,
    x_sample,  # strides in elements, from sample to sample and from token to token
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
    """Computes one token of one sample."""
    row = tl.program_id(0)
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < ROW_SIZE
    offset = row.to(tl.int64) * ROW_SIZE + column
    values = tl.load(x + sample * x_sample + token * x_token + column, inside, 0.0).to(tl.float32)
    if branch is not None:
        update = tl.load(branch + sample * branch_sample + token * branch_token + column, inside, 0.0).to(tl.float32)
        if gate is not None:
            update *= tl.load(gate + sample * gate_sample + token * gate_token + column, inside, 0.0).to(tl.float32)
        rounded = (values + update).to(residual_out.dtype.element_ty)
        tl.store(residual_out + offset, rounded, inside)
        values = rounded.to(tl.float32)  # the norm is of the values as stored
    if modulated_out is not None:
        y = values * inverse_rms(values, epsilon, ROW_SIZE)
        y *= 1.0 + tl.load(scale + sample * scale_sample + token * scale_token + column, inside, 0.0).to(tl.float32)
        y += tl.load(shift + sample * shift_sample + token * shift_token + column, inside, 0.0).to(tl.float32)
        if row_scales_out is not None:
            codes, row_scale = quantize_row(y, modulated_out.dtype.element_ty, MAX_CODE)
            tl.store(modulated_out + offset, codes, inside)
            tl.store(row_scales_out + row, row_scale)
        else:
            tl.store(modulated_out + offset, y.to(modulated_out.dtype.element_ty), inside)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """See `reference.norm_modulate`."""
    modulated = x.new_empty(x.shape)
    _launch(x, scale=scale, shift=shift, epsilon=epsilon, modulated_out=modulated)
    return modulated


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, code_dtype: torch.dtype, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_modulate_quantize`."""
    codes, row_scales = _empty_codes(x, code_dtype)
    _launch(x, scale=scale, shift=shift, epsilon=epsilon, modulated_out=codes, row_scales_out=row_scales)
    return codes, row_scales


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """See `reference.gate_residual`."""
    residual = x.new_empty(x.shape)
    _launch(x, branch=branch, gate=gate, residual_out=residual)
    return residual


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate`."""
    residual, modulated = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(
        x,
        branch=branch,
        gate=gate,
        scale=scale,
        shift=shift,
        epsilon=epsilon,
        residual_out=residual,
        modulated_out=modulated,
    )
    return residual, modulated


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
    residual, (codes, row_scales) = x.new_empty(x.shape), _empty_codes(x, code_dtype)
    _launch(
        x,
        branch=branch,
        gate=gate,
        scale=scale,
        shift=shift,
        epsilon=epsilon,
        residual_out=residual,
        modulated_out=codes,
        row_scales_out=row_scales,
    )
    return residual, codes, row_scales


def _empty_codes(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns empty codes (B, N, D) and scales (B, N, 1)."""
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
    max_code = 0.0 if row_scales_out is None or modulated_out is None else MAX_CODES[modulated_out.dtype]
    tensors = (x, branch, gate, scale, shift)
    strides = [stride for tensor in tensors for stride in broadcast_strides(tensor)]
    with device_of(x):
        _gate_norm_modulate[(samples * tokens,)](
            residual_out,
            modulated_out,
            row_scales_out,
            *tensors,
            tokens,
            *strides,
            epsilon,
            ROW_SIZE=width,
            BLOCK=block,
            MAX_CODE=max_code,
            num_warps=warps_for(block),
        )
