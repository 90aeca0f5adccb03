"""Matmuls in 8-bit floats (e4m3): weights scaled per output channel, activations per token, as in `int8`.

GPUs since Ada and Hopper run them twice as fast as 16-bit ones. Row and column scales are applied inside the matmul
where the GPU's library has such a kernel; elsewhere the codes are multiplied unscaled, which all these GPUs support,
and the sums are scaled afterwards.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels import fused, reference
from kadr.kernels.error_kinds import is_unsupported

E4M3 = torch.float8_e4m3fn
FP8_ALIGNMENT = 16  # both sides of a weight must be multiples of this
FP8_MIN_CAPABILITY = (8, 9)  # Ada, the first with fp8 matmuls
SCALED_MM, UNSCALED_MM, FP32_MATMUL = "scaled", "unscaled", "fp32"  # fastest first; see `select_matmul`
FP8_MAX_RELATIVE_ERROR = 0.01  # of a correct matmul; rounding to bfloat16 makes 0.003

# (device, dtype) -> name in `_MATMULS`. A dict and not functools.cache, which torch's compiler cannot trace.
_selected_matmuls: dict[tuple[torch.device, torch.dtype], str] = {}


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x Wᵀ + b with x quantized to fp8 per row and W in fp8 per output channel (W8A8), summed in about fp32.

    "About": the matmul uses fast accumulation, in which Hopper adds terms aligned to about 14 bits (DeepSeek-V3,
    arXiv 2412.19437, section 3.5.2). The codes have 4.

    Args:
        x: (..., in_features) in fp32, bf16 or fp16.
        weight: float8_e4m3fn (out_features, in_features).
        weight_scale: fp32 (out_features); see `reference.quantize_rows`.
        bias: (out_features).

    Returns:
        (..., out_features) in x's dtype.
    """
    codes, scales = fused.quantize_rows(x.reshape(-1, x.shape[-1]), E4M3)
    return scaled_matmul(codes, scales, weight, weight_scale, bias, x.dtype).view(*x.shape[:-1], -1)


def scaled_matmul(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Computes `linear` of rows that are quantized already: codes (R, K) and their scales, fp32 (R, 1)."""
    return _MATMULS[select_matmul(codes.device, dtype)](codes, row_scales, weight, weight_scale, bias, dtype)


def has_fp8_units(device: torch.device) -> bool:
    """Returns whether a device multiplies 8-bit floats faster than wider ones."""
    if device.type != "cuda" or torch.version.hip is not None:  # AMD's numbers mean other things than NVIDIA's
        return False
    return torch.cuda.get_device_capability(device) >= FP8_MIN_CAPABILITY


def supports_shape(out_features: int, in_features: int) -> bool:
    """Returns whether every device supports a matmul with a weight of this shape."""
    return not out_features % FP8_ALIGNMENT and not in_features % FP8_ALIGNMENT


def select_matmul(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the name of the fastest matmul into `dtype` that computes correctly on a device.

    "scaled" applies the scales inside the matmul, "unscaled" after it, "fp32" multiplies in fp32: the definition.
    """
    if (device, dtype) not in _selected_matmuls:
        _selected_matmuls[device, dtype] = _first_correct_matmul(device, dtype)
    return _selected_matmuls[device, dtype]


def selected_matmuls(device: torch.device) -> dict[str, str]:
    """Returns the matmuls that were selected on a device, by the dtype of their output."""
    return {
        f"fp8 matmul {device.type} {str(dtype).removeprefix('torch.')}": name
        for (owner, dtype), name in _selected_matmuls.items()
        if owner.type == device.type
    }


def reset() -> None:
    """Clears the selected matmuls, so that they are checked again."""
    _selected_matmuls.clear()


def _first_correct_matmul(device: torch.device, dtype: torch.dtype) -> str:
    if not has_fp8_units(device):
        return FP32_MATMUL
    failures = []
    for name in (SCALED_MM, UNSCALED_MM):
        failure = _check_matmul(name, device, dtype)
        if failure is None:
            return name
        failures.append(f"{name}: {failure}")
    warnings.warn(
        f"{device} multiplies 8-bit floats, but torch's fp8 matmuls fail there ({'; '.join(failures)}). They are "
        "computed in float32, which is slow: bfloat16 is faster.",
        KadrWarning,
        stacklevel=4,
    )
    return FP32_MATMUL


def _check_matmul(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Tries a matmul on small inputs. Returns why it cannot be used, or None where it can."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 128, generator=generator).to(device) for count in (48, 96))
    (codes, scales), (weight_codes, weight_scale) = (reference.quantize_rows(tensor, E4M3) for tensor in (x, weight))
    arguments = (codes, scales, weight_codes, weight_scale.flatten(), torch.ones(96, dtype=dtype, device=device))
    expected = _fp32_matmul(*arguments, torch.float32)
    try:
        output = _MATMULS[name](*arguments, dtype).float()
    except Exception as refusal:  # RuntimeError, NotImplementedError, ValueError, by GPU and version
        if not is_unsupported(refusal):
            raise  # memory that ran out, say: the next call may succeed
        return f"{type(refusal).__name__}: {refusal}"
    error = float((output - expected).norm() / expected.norm())
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
    # Sums of codes reach 448² · K, beyond the range of float16; in bfloat16 they take half the memory.
    sums_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    one = row_scales.new_ones(())
    sums = torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, out_dtype=sums_dtype, use_fast_accum=True)
    return fused.rescale(sums, row_scales, weight_scale, bias, dtype)


def _fp32_matmul(
    codes: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return reference.rescale(codes.float() @ weight.float().t(), row_scales, weight_scale, bias, dtype)


_MATMULS = {SCALED_MM: _scaled_mm, UNSCALED_MM: _unscaled_mm, FP32_MATMUL: _fp32_matmul}
