"""Products of 8-bit floats (e4m3): weights by output channel, activations by token, as `int8` has it of whole numbers.

GPUs since Ada and Hopper multiply them twice as fast as 16 bits. Scales by row and column are part of the product where
the chip's library has such a kernel; where it has not, the codes are multiplied as they are, which every one of these
chips can, and scaled afterwards.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels import fused, reference

E4M3 = torch.float8_e4m3fn
FP8_ALIGNMENT = 16  # that both sides of a weight must be
FP8_MIN_CAPABILITY = (8, 9)  # the capability of the first chips that multiply them, Ada
SCALED_MM, UNSCALED_MM, FP32_MATMUL = (
    "scaled",
    "bare",
    "widened",
)  # ways to a product, fastest first; see `select_matmul`
FP8_MAX_RELATIVE_ERROR = 0.01  # relative error of a product that is right; bfloat16 rounds to 0.003

_selected_matmuls: dict[
    tuple[torch.device, torch.dtype], str
] = {}  # ways; a cache that torch's compiler can look through


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with x in 8-bit floats by row and W in 8-bit floats by output channel (W8A8), summed in fp32 or nearly.

    Nearly: products are asked for with fast accumulation, and Hopper's units then add numbers aligned to about 14 bits
    (DeepSeek-V3, arXiv 2412.19437, section 3.5.2). The codes have 4.

    Args:
        x: (..., columns) in fp32, bf16 or fp16.
        weight: float8_e4m3fn (outputs, columns).
        weight_scale: fp32 (outputs); see `reference.quantize_rows`.
        bias: (outputs).

    Returns:
        (..., outputs) in x's dtype.
    """
    codes, scales = fused.quantize_rows(x.reshape(-1, x.shape[-1]), E4M3)
    return scaled_matmul(codes, scales, weight, weight_scale, bias, x.dtype).view(*x.shape[:-1], -1)


def scaled_matmul(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear` of rows that are in 8 bits already: codes (R, K) and what they are multiplied with, fp32 (R, 1)."""
    return _MATMULS[select_matmul(codes.device, dtype)](codes, row_scales, weight, weight_scale, bias, dtype)


def has_fp8_units(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit floats faster than wider ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_MIN_CAPABILITY


def supports_shape(out_features: int, in_features: int) -> bool:
    """Whether a product of these sides can be had on every device."""
    return not out_features % FP8_ALIGNMENT and not in_features % FP8_ALIGNMENT


def select_matmul(device: torch.device, dtype: torch.dtype) -> str:
    """How products into `dtype` are computed on a device: the first way that gives the right numbers there.

    "scaled" applies the scales inside the product, "bare" behind it, "widened" multiplies in fp32: the definition.
    """
    if (device, dtype) not in _selected_matmuls:
        _selected_matmuls[device, dtype] = _first_correct_matmul(device, dtype)
    return _selected_matmuls[device, dtype]


def reset() -> None:
    """Find out again."""
    _selected_matmuls.clear()


def _first_correct_matmul(device: torch.device, dtype: torch.dtype) -> str:
    if not has_fp8_units(device):
        return FP32_MATMUL
    reasons = []
    for name in (SCALED_MM, UNSCALED_MM):
        reason = _check_matmul(name, device, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    warnings.warn(
        f"{device} multiplies 8-bit floats, but torch's products of them fail there ({'; '.join(reasons)}). They are "
        "computed in float32, which is slow: bfloat16 is faster.",
        KadrWarning,
        stacklevel=4,
    )
    return FP32_MATMUL


def _check_matmul(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a way cannot be gone, found out with a small product; None where it can."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 128, generator=generator).to(device) for count in (48, 96))
    (codes, scales), (numbers, scale) = (reference.quantize_rows(tensor, E4M3) for tensor in (x, weight))
    given = (codes, scales, numbers, scale.flatten(), torch.ones(96, dtype=dtype, device=device))
    right = _fp32_matmul(*given, torch.float32)
    try:
        made = _MATMULS[name](*given, dtype).float()
    except Exception as refusal:  # RuntimeError, NotImplementedError, ValueError, by chip and version
        return f"{type(refusal).__name__}: {refusal}"
    error = float((made - right).norm() / right.norm())
    return None if error <= FP8_MAX_RELATIVE_ERROR else f"wrong by {100 * error:.2g} %"


def _scaled_mm(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=row_scales,
        scale_b=weight_scale[None],
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _unscaled_mm(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    # Sums of codes reach 448² · K, which float16 cannot hold; in bfloat16 they take half the memory.
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    one = row_scales.new_ones(())
    sums = torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, out_dtype=wide, use_fast_accum=True)
    return fused.rescale(sums, row_scales, weight_scale, bias, dtype)


def _fp32_matmul(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return reference.rescale(codes.float() @ weight.float().t(), row_scales, weight_scale, bias, dtype)


_MATMULS = {SCALED_MM: _scaled_mm, UNSCALED_MM: _unscaled_mm, FP32_MATMUL: _fp32_matmul}
