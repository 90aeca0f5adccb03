"""The edges between a transformer's branches: the end of one, the entry of the next."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.reference import LARGEST as LARGEST_OF
from kadr.kernels.triton.common import block_of, device_of, in_eight_bits, inverse_rms, steps, warps_for


@triton.jit
def _edge(
    ended,  # (B, N, D), x + gate * branch; None where there is no branch
    entered,  # (B, N, D), its norm, bent, or the codes of that; None where nothing begins
    codes_scale,  # (B * N), None where `entered` is no codes
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
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One token of one sample."""
    row = tl.program_id(0)
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row.to(tl.int64) * WIDTH + column
    numbers = tl.load(x + sample * x_sample + token * x_token + column, inside, 0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + sample * branch_sample + token * branch_token + column, inside, 0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + sample * gate_sample + token * gate_token + column, inside, 0.0).to(tl.float32)
        rounded = (numbers + added).to(ended.dtype.element_ty)
        tl.store(ended + place, rounded, inside)
        numbers = rounded.to(tl.float32)  # the norm is that of the numbers that were stored
    if entered is not None:
        bent = numbers * inverse_rms(numbers, epsilon, WIDTH)
        bent *= 1.0 + tl.load(scale + sample * scale_sample + token * scale_token + column, inside, 0.0).to(tl.float32)
        bent += tl.load(shift + sample * shift_sample + token * shift_token + column, inside, 0.0).to(tl.float32)
        if codes_scale is not None:
            codes, factor = in_eight_bits(bent, entered.dtype.element_ty, LARGEST)
            tl.store(entered + place, codes, inside)
            tl.store(codes_scale + row, factor)
        else:
            tl.store(entered + place, bent.to(entered.dtype.element_ty), inside)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """See `reference.norm_modulate`."""
    entered = x.new_empty(x.shape)
    _launch(x, scale=scale, shift=shift, epsilon=epsilon, entered=entered)
    return entered


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, kind: torch.dtype, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_modulate_quantize`."""
    codes, factors = _eight_bits(x, kind)
    _launch(x, scale=scale, shift=shift, epsilon=epsilon, entered=codes, codes_scale=factors)
    return codes, factors


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """See `reference.gate_residual`."""
    ended = x.new_empty(x.shape)
    _launch(x, branch=branch, gate=gate, ended=ended)
    return ended


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate`."""
    ended, entered = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, branch=branch, gate=gate, scale=scale, shift=shift, epsilon=epsilon, ended=ended, entered=entered)
    return ended, entered


def gate_residual_norm_modulate_quantize(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    kind: torch.dtype,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate_quantize`."""
    ended, (codes, factors) = x.new_empty(x.shape), _eight_bits(x, kind)
    made = {"ended": ended, "entered": codes, "codes_scale": factors}
    _launch(x, branch=branch, gate=gate, scale=scale, shift=shift, epsilon=epsilon, **made)
    return ended, codes, factors


def _eight_bits(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for codes (B, N, D) and their scales (B, N, 1)."""
    return x.new_empty(x.shape, dtype=kind), x.new_empty((*x.shape[:2], 1), dtype=torch.float32)


def _launch(
    x: Tensor,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    epsilon: float = 0.0,
    ended: Tensor | None = None,
    entered: Tensor | None = None,
    codes_scale: Tensor | None = None,
) -> None:
    samples, tokens, width = x.shape
    block = block_of(width)
    largest = 0.0 if codes_scale is None or entered is None else LARGEST_OF[entered.dtype]
    tensors = (x, branch, gate, scale, shift)
    places = [step for tensor in tensors for step in steps(tensor)]
    with device_of(x):
        _edge[(samples * tokens,)](
            ended,
            entered,
            codes_scale,
            *tensors,
            tokens,
            *places,
            epsilon,
            WIDTH=width,
            BLOCK=block,
            LARGEST=largest,
            num_warps=warps_for(block),
        )
