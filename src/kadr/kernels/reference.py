"""What each fused operation computes, in plain torch, on any device and in any float dtype.

These are the definitions. `fused` runs a kernel in the place of one where there is a kernel for it; it computes in fp32
and rounds what it returns once, where plain torch rounds to the dtype after each operation. In fp32 the two agree up to
the order of sums, in narrower dtypes up to roundings, of which the kernel makes fewer.

Numbers out of GGML's blocks are defined in `dequant`.

B batch, N tokens, D width; C channels, F frames, H rows, W columns; R rows, K columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The dtypes of 8 bits, and the number that the largest magnitude of a row becomes in each.
MAX_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
MIN_ABS_MAX = 1e-12  # a row of zeros must not divide by zero


def rms_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x (..., D) over its root mean square along D, which is computed in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The entry of a branch: rms_norm(x) * (1 + scale) + shift.

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
    """`norm_modulate`, then `quantize_rows`: codes (B, N, D) and what each token's are multiplied with (B, N, 1)."""
    return quantize_rows(norm_modulate(x, scale, shift, epsilon), code_dtype)


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """The end of a branch: x + gate * branch.

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
    """The end of a branch and the entry of the next: `gate_residual`, and `norm_modulate` of what that gives."""
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
    """`gate_residual`, and `norm_modulate_quantize` of what that gives: x, codes (B, N, D), scales (B, N, 1)."""
    x = gate_residual(x, gate, branch)
    return x, *norm_modulate_quantize(x, scale, shift, code_dtype, epsilon)


def norm_rope(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Queries or keys before their heads part: rms_norm(x) * weight, then the pairs (0, 1), (2, 3), ... rotated.

    Args:
        x: (B, N, D), D even.
        weight: (D).
        cosine, sine: (B or 1, N, D), of the angle of each number.

    Returns:
        (B, N, D) in x's dtype.
    """
    return apply_rope(rms_norm(x, epsilon) * weight, cosine, sine)


def apply_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The pairs (0, 1), (2, 3), ... of x (B, N, D) rotated by angles of which (B or 1, N, D) are cosines and sines."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x * cosine + torch.stack([-odd, even], dim=-1).flatten(-2) * sine
    crosswise = torch.empty_like(x)  # written to in its place: half the time
    first, second = crosswise.unflatten(-1, (-1, 2)).unbind(-1)
    torch.neg(odd, out=first)
    second.copy_(even)
    return torch.addcmul(x * cosine, crosswise, sine)


def quantize_rows(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., K) to 8 bits, each row with a scale of its own, from 0 both ways.

    Args:
        code_dtype: a dtype of `MAX_CODE`. Ties go to the even neighbour in both.

    Returns:
        codes (..., K) of that dtype, and fp32 (..., 1), what they are multiplied with.
    """
    largest = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=MIN_ABS_MAX)
    scaled = torch.mul(x.float(), MAX_CODES[code_dtype] / largest)
    return (scaled.round_() if code_dtype == torch.int8 else scaled).to(code_dtype), largest / MAX_CODES[code_dtype]


def gelu_quantize(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The middle of a feed-forward: GELU in its tanh form, then `quantize_rows`. x (R, K)."""
    return quantize_rows(F.gelu(x, approximate="tanh"), code_dtype)


def rescale(sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The end of a product in 8 bits: sums * rows * columns + bias.

    Args:
        sums: (R, O), the product of the codes, int32 or a float dtype.
        row_scales: fp32 (R, 1), the scales of what came in.
        column_scales: fp32 (O), those of the weight.
        bias: (O).

    Returns:
        (R, O) in `dtype`.
    """
    made = sums.float() * column_scales * row_scales
    return (made if bias is None else made + bias).to(dtype)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """What comes before a convolution of the VAE: each position over the root mean square of its channels, bent, SiLU.

    Args:
        x: (B, C, F, H, W).
        scale, shift: (B or 1, C); None where the noise level bends nothing.

    Returns:
        (B, C, F, H, W) in x's dtype and memory format. The norm, too, is in x's own dtype, as the official one.
    """
    x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + epsilon)
    if scale is not None and shift is not None:
        scale, shift = (1 + scale)[..., None, None, None], shift[..., None, None, None]
        # Without gradients the same sums go into one tensor: fresh memory takes longer than they do.
        x = x * scale + shift if torch.is_grad_enabled() else x.mul_(scale).add_(shift)
    return F.silu(x, inplace=not torch.is_grad_enabled())


def bias_residual(x: Tensor, bias: Tensor | None, skip: Tensor) -> Tensor:
    """skip + (x + bias): the end of a residual layer of the VAE whose last convolution ran without its bias.

    Args:
        x, skip: (B, C, F, H, W).
        bias: (C).
    """
    return skip + (x if bias is None else x + bias[:, None, None, None])
