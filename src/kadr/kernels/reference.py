"""Definitions of the fused operations in plain torch, for any device and any float dtype.

`fused` runs a kernel instead of a definition where there is one. A kernel computes in fp32 and rounds its result once,
where plain torch rounds to the dtype after each operation. In fp32 the two agree up to the order of sums, in narrower
dtypes up to roundings, of which the kernel makes fewer.

`dequant` has the definitions for GGML's blocks.

B batch, N tokens, D width; C channels, F frames, H rows, W columns; R rows, K columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# 8-bit dtypes, and the code that the largest magnitude of a row gets in each.
MAX_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
MIN_ABS_MAX = 1e-12  # avoids a division by zero for a row of zeros


def rms_norm(x: Tensor, epsilon: float = 1e-6, factor: float = 1.0) -> Tensor:
    """Divides x (..., D) by its root mean square along D and multiplies it by `factor`, computed in fp32."""
    wide = x.float()
    return (wide * (factor * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon))).to(x.dtype)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Computes the input of a branch: rms_norm(x) * (1 + scale) + shift.

    Args:
        x: (B, N, D).
        scale, shift: (B or 1, N or 1, D).

    Returns:
        (B, N, D) in x's dtype.
    """
    return torch.addcmul(shift, rms_norm(x, epsilon), 1 + scale)


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, code_dtype: torch.dtype, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Computes `norm_modulate`, then `quantize_rows`: codes (B, N, D) and the scale of each token (B, N, 1)."""
    return quantize_rows(norm_modulate(x, scale, shift, epsilon), code_dtype)


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """Adds the output of a branch to the residual stream: x + gate * branch.

    Args:
        x, branch: (B, N, D).
        gate: (B or 1, N or 1, D); None for 1.

    Returns:
        (B, N, D) in x's dtype.
    """
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Ends a branch and begins the next: `gate_residual`, and `norm_modulate` of its result."""
    x = gate_residual(x, gate, branch)
    return x, norm_modulate(x, scale, shift, epsilon)


def gate_residual_norm_modulate_quantize(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    code_dtype: torch.dtype,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `gate_residual`, and `norm_modulate_quantize` of its result: x, codes (B, N, D), scales (B, N, 1)."""
    x = gate_residual(x, gate, branch)
    return x, *norm_modulate_quantize(x, scale, shift, code_dtype, epsilon)


def norm_rope(x: Tensor, weight: Tensor, rotation: Tensor | None, epsilon: float = 1e-5, factor: float = 1.0) -> Tensor:
    """Normalises queries or keys over all heads, rms_norm(x) * weight * factor, then applies RoPE.

    Args:
        x: (B, N, D), D even.
        weight: (D).
        rotation: fp32 (B or 1, N, D / 2, 2), cosine and sine of the angle of each pair; None: no RoPE.
        factor: 1/√d for the queries of attention heads of width d, else 1.

    Returns:
        (B, N, D) in x's dtype.
    """
    normalised = rms_norm(x, epsilon, factor) * weight
    return normalised if rotation is None else apply_rope(normalised, rotation)


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of x (B, N, D) by angles, computed in fp32; see `norm_rope`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        (even, odd), (cosine, sine) = pairs.unbind(-1), rotation.unbind(-1)
        rotated = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    else:  # in half the time
        rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(rotation))
    return rotated.flatten(-2).to(x.dtype)


def quantize_rows(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes x (..., K) symmetrically to 8 bits with one scale per row.

    Args:
        code_dtype: a dtype of `MAX_CODES`. Ties round to even in both.

    Returns:
        Codes (..., K) of that dtype and their scales, fp32 (..., 1): codes * scales is about x.
    """
    abs_max = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=MIN_ABS_MAX)
    scaled = torch.mul(x.float(), MAX_CODES[code_dtype] / abs_max)
    return (scaled.round_() if code_dtype == torch.int8 else scaled).to(code_dtype), abs_max / MAX_CODES[code_dtype]


def gelu_quantize(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes the middle of a feed-forward: GELU in its tanh form, then `quantize_rows`. x (R, K)."""
    return quantize_rows(F.gelu(x, approximate="tanh"), code_dtype)


def rescale(sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Finishes a matmul in 8 bits: sums * row_scales * column_scales + bias.

    Args:
        sums: (R, O), the product of the codes, int32 or a float dtype.
        row_scales: fp32 (R, 1), the scales of the activations.
        column_scales: fp32 (O), the scales of the weight.
        bias: (O).

    Returns:
        (R, O) in `dtype`.
    """
    output = sums.float() * column_scales * row_scales
    return (output if bias is None else output + bias).to(dtype)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """Normalises each position over its channels, modulates and applies SiLU: the input of a VAE convolution.

    Args:
        x: (B, C, F, H, W).
        scale, shift: (B or 1, C); None where the timestep modulates nothing.

    Returns:
        (B, C, F, H, W) in x's dtype and memory format. The norm, too, is in x's own dtype, as in the official code.
    """
    x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + epsilon)
    if scale is not None and shift is not None:
        scale, shift = (1 + scale)[..., None, None, None], shift[..., None, None, None]
        # Without gradients, computed in place: allocating takes longer than the arithmetic.
        x = x * scale + shift if torch.is_grad_enabled() else x.mul_(scale).add_(shift)
    return F.silu(x, inplace=not torch.is_grad_enabled())


def bias_residual(x: Tensor, bias: Tensor | None, skip: Tensor) -> Tensor:
    """Computes skip + (x + bias): the end of a VAE residual block whose last convolution ran without its bias.

    Args:
        x, skip: (B, C, F, H, W).
        bias: (C).
    """
    return skip + (x if bias is None else x + bias[:, None, None, None])
