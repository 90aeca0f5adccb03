"""Products of 8-bit whole numbers: weights by output channel, activations by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127  # of the 8 bits; -128 is left out, so that the range is symmetric
SMALLEST = 1e-12  # a row of zeros must not divide by zero
PIECE = 131_072  # products that are scaled at a time: what stays in a core's cache
FEWEST_ROWS, MULTIPLE = 17, 8  # of a product on CUDA (torch._int_mm); and its other sides are multiples of this


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) of any float dtype -> int8 of that shape, and the scale (rows, 1) in fp32 that gives it back.

    Symmetric: the largest magnitude of a row becomes 127.
    """
    largest = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=SMALLEST)
    return torch.mul(x.float(), LARGEST / largest).round_().to(torch.int8), largest / LARGEST


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with x in 8 bits by row and W in 8 bits by output channel (W8A8), summed exactly in 32 bits.

    Args:
        x: (..., columns) in fp32, bf16 or fp16.
        weight: int8 (outputs, columns).
        scale: fp32 (outputs); see `quantize_rows`.
        bias: (outputs).

    Returns:
        (..., outputs) in x's dtype.
    """
    rows, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
    sums = _product(rows, weight)
    made = torch.empty(sums.shape, dtype=x.dtype, device=x.device)
    step = max(1, PIECE // sums.shape[1]) if x.device.type == "cpu" else len(sums)
    for start in range(0, len(sums), step):
        piece = slice(start, start + step)
        scaled = sums[piece].float().mul_(scale).mul_(scales[piece])
        made[piece] = scaled if bias is None else scaled.add_(bias)
    return made.view(*x.shape[:-1], -1)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """int8 (R, K) and (O, K) -> int32 (R, O)."""
    count = len(rows)
    if rows.is_cuda and count < FEWEST_ROWS:
        rows = F.pad(rows, (0, 0, 0, FEWEST_ROWS - count))
    return torch._int_mm(rows, weight.t())[:count]


def fits(outputs: int, columns: int) -> bool:
    """Whether a product of these sides can be had on every device."""
    return not outputs % MULTIPLE and not columns % MULTIPLE
