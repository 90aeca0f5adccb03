"""Quantizes to GGML's K formats: blocks of 256, whose groups have a scale each, or a scale and an offset.

`scale_search` finds the scales, offsets and codes; here they become bytes. Every column is one block: values (256, N),
bytes (type size, N). `kernels.dequant` describes the layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.quant.scale_search import quantize_affine, quantize_symmetric


def q2_k(values: Tensor) -> Tensor:
    """Quantizes fp32 (256, N) to bytes (84, N)."""
    codes, scales, offsets, factors = _quantize_affine(values, 16, 3, 15)
    return torch.cat([pack_bits(torch.cat([scales, offsets]), 4, 16), pack_bits(codes, 2, 32), factors])


def q3_k(values: Tensor) -> Tensor:
    """Quantizes fp32 (256, N) to bytes (110, N)."""
    codes, scales, factor = _quantize_symmetric(values, 16, 4, 32)
    scales = scales.add_(32).view(torch.uint8)
    split = [pack_bits(scales & 15, 4, 8), pack_bits(scales >> 4, 2, 4)]
    return torch.cat([pack_bits(codes >> 2, 1, 32), pack_bits(codes & 3, 2, 32), *split, factor])


def q4_k(values: Tensor) -> Tensor:
    """Quantizes fp32 (256, N) to bytes (144, N)."""
    codes, scales, offsets, factors = _quantize_affine(values, 8, 15, 63)
    return torch.cat([factors, _pack_6bit_scales(scales, offsets), pack_bits(codes, 4, 32)])


def q5_k(values: Tensor) -> Tensor:
    """Quantizes fp32 (256, N) to bytes (176, N)."""
    codes, scales, offsets, factors = _quantize_affine(values, 8, 31, 63)
    split = [pack_bits(codes >> 4, 1, 32), pack_bits(codes & 15, 4, 32)]
    return torch.cat([factors, _pack_6bit_scales(scales, offsets), *split])


def q6_k(values: Tensor) -> Tensor:
    """Quantizes fp32 (256, N) to bytes (210, N)."""
    codes, scales, factor = _quantize_symmetric(values, 16, 32, 128)
    return torch.cat([pack_bits(codes & 15, 4, 64), pack_bits(codes >> 4, 2, 32), scales.view(torch.uint8), factor])


def pack_bits(codes: Tensor, bits: int, width: int) -> Tensor:
    """Packs integers of `bits` bits, several to a byte.

    Args:
        codes: uint8 (count, N). The first `width` go into the lowest bits of `width` bytes, the next into the bits
            above, and so on; then comes the next run of bytes.

    Returns:
        uint8 (count * bits / 8, N).
    """
    runs = codes.unflatten(0, (-1, 8 // bits, width))
    packed = runs[:, 0]
    for index in range(1, 8 // bits):
        packed = packed | runs[:, index] << bits * index
    return packed.flatten(0, 1)


def to_uint8(values: Tensor) -> Tensor:
    """Converts values in [0, 128) to uint8, truncating. By way of int8, which is six times as fast on a CPU."""
    return values.to(torch.int8).view(torch.uint8)


def fp16_bytes(values: Tensor) -> Tensor:
    """Returns values (1, N) as the bytes of float16 (2, N).

    Raises:
        ValueError: a value is out of the range of float16.
    """
    half = values.half()
    if not bool(half.isfinite().all()):
        raise ValueError("its values are so large that the scale of a block does not fit into float16")
    return half.view(torch.uint8).view(-1, 2).t()


def _pack_6bit_scales(scales: Tensor, offsets: Tensor) -> Tensor:
    """Packs the 6-bit scales and offsets of Q4_K and Q5_K, uint8 (8, N) each, into bytes (12, N)."""
    first_bytes = [part[:4] | part[4:] >> 4 << 6 for part in (scales, offsets)]
    return torch.cat([*first_bytes, scales[4:] & 15 | offsets[4:] << 4])


def _quantize_affine(
    values: Tensor, groups: int, max_code: int, max_scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns codes uint8 (256, N), scales and offsets uint8 (groups, N), and their two factors in bytes (4, N)."""
    x = values.unflatten(0, (groups, -1))
    codes, scales, offsets, factor, offset_factor = quantize_affine(x, max_code, max_scale)
    factors = torch.cat([fp16_bytes(factor[0]), fp16_bytes(offset_factor[0])])
    return to_uint8(codes).flatten(0, 1), to_uint8(scales[:, 0]), to_uint8(offsets[:, 0]), factors


def _quantize_symmetric(values: Tensor, groups: int, max_code: int, max_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes from 0, uint8 (256, N), scales int8 (groups, N), and their factor in bytes (2, N)."""
    codes, scales, factor = quantize_symmetric(values.unflatten(0, (groups, -1)), max_code, max_scale)
    return to_uint8(codes.add_(max_code)).flatten(0, 1), scales[:, 0].to(torch.int8), fp16_bytes(factor[0])
