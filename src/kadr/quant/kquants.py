"""Numbers into the K formats of GGML: blocks of 256, whose groups have a scale each, or a scale and an offset.

`search` finds these and the codes; here they become bytes. Blocks lie side by side: numbers (256, N), bytes (size, N).
`kernels.dequant` describes the layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.quant.scale_search import round_around_zero, round_with_offsets


def q2_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (84, N)."""
    codes, scales, offsets, factors = _with_offsets(numbers, 16, 3, 15)
    return torch.cat([gathered(torch.cat([scales, offsets]), 4, 16), gathered(codes, 2, 32), factors])


def q3_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (110, N)."""
    codes, scales, factor = _around_zero(numbers, 16, 4, 32)
    scales = scales.add_(32).view(torch.uint8)
    split = [gathered(scales & 15, 4, 8), gathered(scales >> 4, 2, 4)]
    return torch.cat([gathered(codes >> 2, 1, 32), gathered(codes & 3, 2, 32), *split, factor])


def q4_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (144, N)."""
    codes, scales, offsets, factors = _with_offsets(numbers, 8, 15, 63)
    return torch.cat([factors, _in_twelve_bytes(scales, offsets), gathered(codes, 4, 32)])


def q5_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (176, N)."""
    codes, scales, offsets, factors = _with_offsets(numbers, 8, 31, 63)
    split = [gathered(codes >> 4, 1, 32), gathered(codes & 15, 4, 32)]
    return torch.cat([factors, _in_twelve_bytes(scales, offsets), *split])


def q6_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (210, N)."""
    codes, scales, factor = _around_zero(numbers, 16, 32, 128)
    return torch.cat([gathered(codes & 15, 4, 64), gathered(codes >> 4, 2, 32), scales.view(torch.uint8), factor])


def gathered(codes: Tensor, bits: int, width: int) -> Tensor:
    """Whole numbers of so many bits, several to a byte.

    Args:
        codes: uint8 (count, N). The first `width` come into the lowest bits of `width` bytes, the next into the bits
            above, and so on; then comes the next run of bytes.

    Returns:
        uint8 (count * bits / 8, N).
    """
    runs = codes.unflatten(0, (-1, 8 // bits, width))
    made = runs[:, 0]
    for place in range(1, 8 // bits):
        made = made | runs[:, place] << bits * place
    return made.flatten(0, 1)


def in_bytes(numbers: Tensor) -> Tensor:
    """Whole numbers below 128 in uint8; a fraction is cut off. The detour by int8 is six times as fast on a CPU."""
    return numbers.to(torch.int8).view(torch.uint8)


def halves(values: Tensor) -> Tensor:
    """values (1, N) as float16: bytes (2, N).

    Raises:
        ValueError: one is beyond float16.
    """
    half = values.half()
    if not bool(half.isfinite().all()):
        raise ValueError("its numbers are so large that the scale of a block does not fit into float16")
    return half.view(torch.uint8).view(-1, 2).t()


def _in_twelve_bytes(scales: Tensor, offsets: Tensor) -> Tensor:
    """Of Q4_K and Q5_K; uint8 (8, N) each, of 6 bits."""
    first = [part[:4] | part[4:] >> 4 << 6 for part in (scales, offsets)]
    return torch.cat([*first, scales[4:] & 15 | offsets[4:] << 4])


def _with_offsets(numbers: Tensor, groups: int, top: int, top_scale: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 (256, N); scales and offsets uint8 (groups, N); their two factors in bytes (4, N)."""
    x = numbers.unflatten(0, (groups, -1))
    codes, scales, offsets, factor, offset_factor = round_with_offsets(x, top, top_scale)
    factors = torch.cat([halves(factor[0]), halves(offset_factor[0])])
    return in_bytes(codes).flatten(0, 1), in_bytes(scales[:, 0]), in_bytes(offsets[:, 0]), factors


def _around_zero(numbers: Tensor, groups: int, top: int, top_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0, uint8 (256, N); scales int8 (groups, N); their factor in bytes (2, N)."""
    codes, scales, factor = round_around_zero(numbers.unflatten(0, (groups, -1)), top, top_scale)
    return in_bytes(codes.add_(top)).flatten(0, 1), scales[:, 0].to(torch.int8), halves(factor[0])
