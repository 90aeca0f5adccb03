"""Walsh-Hadamard transform."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_MATRIX_SIZE = 128  # columns of one matmul; wider transforms take two


def hadamard_transform(x: Tensor, block_size: int) -> Tensor:
    """Rotates each run of `block_size` columns of x (..., D) by H / sqrt(block_size), H in Sylvester's order.

    The transform is its own inverse. Computed in fp32, returned in x's dtype.

    Args:
        block_size: a power of two that divides D.

    Raises:
        ValueError: `block_size` is not a power of two, or does not divide D.
    """
    if block_size < 1 or block_size & (block_size - 1) or x.shape[-1] % block_size:
        raise ValueError(f"block_size is {block_size}; it must be a power of two that divides {x.shape[-1]}")
    inner = min(block_size, MAX_MATRIX_SIZE)
    # H of size a·b is the Kronecker product of H of size a and H of size b.
    rotated = x.float().unflatten(-1, (-1, block_size // inner, inner))
    rotated = rotated @ _hadamard_matrix(inner, x.device)
    if block_size > inner:
        rotated = (rotated.transpose(-1, -2) @ _hadamard_matrix(block_size // inner, x.device)).transpose(-1, -2)
    return rotated.flatten(-3).to(x.dtype)


@cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """Returns H / sqrt(size), (size, size), symmetric and orthogonal."""
    with torch.inference_mode(False):  # it is cached, and a later caller may need gradients
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(device)
