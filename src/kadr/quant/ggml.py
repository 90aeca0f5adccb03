"""Numbers into the block formats of GGML, and the simple ones of them: one block of 32, one scale.

A simple format spans the numbers of a block: its bytes are those of llama.cpp's reference quantizers, and of the
`gguf` package. `kquants` has the others; `kernels.dequant` describes the layouts, and goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.kernels.ggml_types import Packing
from kadr.quant.kquants import gathered, halves, in_bytes, q2_k, q3_k, q4_k, q5_k, q6_k
from kadr.quant.scale_search import inverse

PIECE = 262_144  # numbers that are worked on at a time: a dozen temporaries of this size stay near the cores


def quantize(weight: Tensor, packing: Packing) -> Tensor:
    """Round a weight to the codes of a block format.

    Args:
        weight: (rows, columns) in a float dtype.

    Returns:
        uint8 (rows, bytes of a row).

    Raises:
        ValueError: a row is no whole number of blocks; a number is NaN or infinite, or too large for the scale of its
            block to fit into float16.
    """
    weight = weight.detach()
    rows, columns = weight.shape
    out = torch.empty(rows, packing.row_bytes(columns), dtype=torch.uint8, device=weight.device)
    write = _WRITE[packing.name]
    step = max(1, PIECE // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        piece = weight[part].float()
        _require_finite(piece)
        # Blocks side by side. Of a single block this is the weight itself, so nothing writes to it.
        numbers = piece.reshape(-1, packing.elements).t().contiguous()
        out[part] = write(numbers).t().reshape(-1, out.shape[1])
    return out


def _require_finite(numbers: Tensor) -> None:
    low, high = (bound.item() for bound in numbers.aminmax())
    if low != low:
        raise ValueError("it has a number that is NaN")
    if torch.inf in (-low, high):
        raise ValueError("it has a number that is infinite")


def _q8_0(numbers: Tensor) -> Tensor:
    """fp32 (32, N) -> bytes (34, N)."""
    scale = numbers.abs().amax(0, keepdim=True) / 127
    scaled = numbers * inverse(scale)
    whole = scaled.trunc()
    codes = scaled.sub_(whole).mul_(2).trunc_().add_(whole)  # halves away from zero, where round goes to the even
    return torch.cat([halves(scale), in_bytes(codes)])


def _q4_0(numbers: Tensor) -> Tensor:
    """fp32 (32, N) -> bytes (18, N)."""
    scale, codes = _around_zero(numbers, 8)
    return torch.cat([scale, gathered(codes, 4, 16)])


def _q4_1(numbers: Tensor) -> Tensor:
    """fp32 (32, N) -> bytes (20, N)."""
    scale, lowest, codes = _above_lowest(numbers, 15)
    return torch.cat([scale, lowest, gathered(codes, 4, 16)])


def _q5_0(numbers: Tensor) -> Tensor:
    """fp32 (32, N) -> bytes (22, N)."""
    scale, codes = _around_zero(numbers, 16)
    return torch.cat([scale, gathered(codes >> 4, 1, 1), gathered(codes & 15, 4, 16)])


def _q5_1(numbers: Tensor) -> Tensor:
    """fp32 (32, N) -> bytes (24, N)."""
    scale, lowest, codes = _above_lowest(numbers, 31)
    return torch.cat([scale, lowest, gathered(codes >> 4, 1, 1), gathered(codes & 15, 4, 16)])


def _around_zero(numbers: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """scale * (code - half): the scale in bytes, and codes uint8 below 2 * half.

    Code 0 goes to the number of the largest magnitude, the first if there are several: their signs may differ.
    """
    scale = numbers.gather(0, numbers.abs().argmax(0, keepdim=True)) / -half
    codes = in_bytes((numbers * inverse(scale)).add_(half + 0.5)).clamp_(max=2 * half - 1)
    return halves(scale), codes


def _above_lowest(numbers: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale * code + lowest: the two in bytes, and codes uint8 from 0 to `top`."""
    lowest = numbers.amin(0, keepdim=True)
    scale = (numbers.amax(0, keepdim=True) - lowest) / top
    codes = in_bytes((numbers - lowest).mul_(inverse(scale)).add_(0.5)).clamp_(max=top)
    return halves(scale), halves(lowest), codes


_WRITE: dict[str, Callable[[Tensor], Tensor]] = {
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
