"""Quantizes to GGML's block formats; has the simple formats, with one scale per block of 32.

In a simple format the codes span the values of a block: its bytes equal those of llama.cpp's reference quantizers and
of the `gguf` package. `kquants` has the other formats; `kernels.dequant` describes the layouts, and dequantizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.cancellation import check_cancelled
from kadr.kernels.ggml_types import GGMLType
from kadr.quant.kquants import fp16_bytes, pack_bits, q2_k, q3_k, q4_k, q5_k, q6_k, to_uint8
from kadr.quant.scale_search import safe_reciprocal

GGML_SLICE_ELEMENTS = 262_144  # quantized at a time, so that a dozen temporaries of this size stay in the cache


def quantize(weight: Tensor, ggml_type: GGMLType) -> Tensor:
    """Quantizes a weight to a block format.

    Args:
        weight: (rows, columns) in a float dtype.

    Returns:
        uint8 (rows, bytes per row).

    Raises:
        ValueError: a row does not divide into blocks; a value is NaN, infinite, or too large for the scale of its block
            to fit into float16.
    """
    weight = weight.detach()
    rows, columns = weight.shape
    out = torch.empty(rows, ggml_type.row_bytes(columns), dtype=torch.uint8, device=weight.device)
    quantize_blocks = _QUANTIZERS[ggml_type.name]
    step = max(1, GGML_SLICE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        check_cancelled()
        part = slice(start, start + step)
        rows_part = weight[part].float()
        _require_finite(rows_part)
        # (block size, N). For a single block this is a view of the weight, so nothing writes to it.
        values = rows_part.reshape(-1, ggml_type.block_size).t().contiguous()
        out[part] = quantize_blocks(values).t().reshape(-1, out.shape[1])
    return out


def _require_finite(values: Tensor) -> None:
    low, high = (bound.item() for bound in values.aminmax())
    if low != low:
        raise ValueError("it has a value that is NaN")
    if torch.inf in (-low, high):
        raise ValueError("it has a value that is infinite")


def _q8_0(values: Tensor) -> Tensor:
    """Quantizes fp32 (32, N) to bytes (34, N)."""
    scale = values.abs().amax(0, keepdim=True) / 127
    scaled = values * safe_reciprocal(scale)
    truncated = scaled.trunc()
    codes = scaled.sub_(truncated).mul_(2).trunc_().add_(truncated)  # ties away from zero; round takes the even
    return torch.cat([fp16_bytes(scale), to_uint8(codes)])


def _q4_0(values: Tensor) -> Tensor:
    """Quantizes fp32 (32, N) to bytes (18, N)."""
    scale, codes = _quantize_symmetric(values, 8)
    return torch.cat([scale, pack_bits(codes, 4, 16)])


def _q4_1(values: Tensor) -> Tensor:
    """Quantizes fp32 (32, N) to bytes (20, N)."""
    scale, lowest, codes = _quantize_affine(values, 15)
    return torch.cat([scale, lowest, pack_bits(codes, 4, 16)])


def _q5_0(values: Tensor) -> Tensor:
    """Quantizes fp32 (32, N) to bytes (22, N)."""
    scale, codes = _quantize_symmetric(values, 16)
    return torch.cat([scale, pack_bits(codes >> 4, 1, 1), pack_bits(codes & 15, 4, 16)])


def _q5_1(values: Tensor) -> Tensor:
    """Quantizes fp32 (32, N) to bytes (24, N)."""
    scale, lowest, codes = _quantize_affine(values, 31)
    return torch.cat([scale, lowest, pack_bits(codes >> 4, 1, 1), pack_bits(codes & 15, 4, 16)])


def _quantize_symmetric(values: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Quantizes to scale * (code - half): the scale in bytes, and codes uint8 below 2 * half.

    The value of the largest magnitude gets code 0, the first if there are several: their signs may differ.
    """
    scale = values.gather(0, values.abs().argmax(0, keepdim=True)) / -half
    codes = to_uint8((values * safe_reciprocal(scale)).add_(half + 0.5)).clamp_(max=2 * half - 1)
    return fp16_bytes(scale), codes


def _quantize_affine(values: Tensor, max_code: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes to scale * code + lowest: the two in bytes, and codes uint8 from 0 to `max_code`."""
    lowest = values.amin(0, keepdim=True)
    scale = (values.amax(0, keepdim=True) - lowest) / max_code
    codes = to_uint8((values - lowest).mul_(safe_reciprocal(scale)).add_(0.5)).clamp_(max=max_code)
    return fp16_bytes(scale), fp16_bytes(lowest), codes


_QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q6_K": q6_k,
    "Q5_K": q5_k,
    "Q5_1": _q5_1,
    "Q5_0": _q5_0,
    "Q4_K": q4_k,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "Q3_K": q3_k,
    "Q2_K": q2_k,
}
