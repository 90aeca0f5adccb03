"""The Walsh-Hadamard rotation."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WIDEST = 128  # columns that one product turns; wider rotations are two


def rotate(x: Tensor, block: int) -> Tensor:
    """x (..., D) with each run of `block` columns turned by H / sqrt(block), H in Sylvester's order.

    The rotation is its own inverse. Computed in fp32, returned in x's dtype.

    Args:
        block: a power of two that divides D.

    Raises:
        ValueError: it is none.
    """
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"a rotation of {block} columns: it must be a power of two that divides {x.shape[-1]}")
    narrow = min(block, WIDEST)
    # H of a·b columns is the Kronecker product of H of a and H of b.
    made = x.float().unflatten(-1, (-1, block // narrow, narrow))
    made = made @ _matrix(narrow, x.device)
    if block > narrow:
        made = (made.transpose(-1, -2) @ _matrix(block // narrow, x.device)).transpose(-1, -2)
    return made.flatten(-3).to(x.dtype)


@cache
def _matrix(size: int, device: torch.device) -> Tensor:
    """(size, size), symmetric and orthogonal."""
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return (made / size**0.5).to(device)
