"""The Walsh-Hadamard rotation."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_MATRIX_SIZE = 128  # columns that one product turns; wider rotations are two


def hadamard_transform(x: Tensor, block_size: int) -> Tensor:
    """x (..., D) with each run of `block_size` columns turned by H / sqrt(block), H in Sylvester's order.

    The rotation is its own inverse. Computed in fp32, returned in x's dtype.

    Args:
        block_size: a power of two that divides D.

    Raises:
        ValueError: it is none.
    """
    if block_size < 1 or block_size & (block_size - 1) or x.shape[-1] % block_size:
        raise ValueError(f"a rotation of {block_size} columns: it must be a power of two that divides {x.shape[-1]}")
    narrow = min(block_size, MAX_MATRIX_SIZE)
    # H of a·b columns is the Kronecker product of H of a and H of b.
    made = x.float().unflatten(-1, (-1, block_size // narrow, narrow))
    made = made @ _hadamard_matrix(narrow, x.device)
    if block_size > narrow:
        made = (made.transpose(-1, -2) @ _hadamard_matrix(block_size // narrow, x.device)).transpose(-1, -2)
    return made.flatten(-3).to(x.dtype)


@cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """(size, size), symmetric and orthogonal."""
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return (made / size**0.5).to(device)
