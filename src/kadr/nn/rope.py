"""Rotary position embeddings (RoPE; Su et al. 2021, arXiv:2104.09864) over fractions of time, height and width."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kadr.kernels.reference import apply_rope


class Rope(NamedTuple):
    """Cosine and sine of the angle of each pair of elements, fp32 (B, N, D / 2, 2); (1, N, D / 2, 2) for all samples.

    They are not rounded to the model's dtype, whatever that is.
    """

    rotation: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates the pairs (0, 1), (2, 3), ... of x (B, N, D)."""
        return apply_rope(x, self.rotation)

    def for_samples(self, samples: slice) -> Rope:
        """Returns the table of some samples of the batch."""
        return self if len(self.rotation) == 1 else Rope(self.rotation[samples])


def rope_table(positions: Tensor, width: int, *, max_positions: tuple[float, float, float], theta: float) -> Rope:
    """Computes the RoPE table for tokens at positions (B, 3, N), fp32: seconds, then pixels down, then pixels right.

    A position becomes a fraction p of its maximum (20 s, 2048 px, 2048 px). The angles are (2p - 1) · pi/2 ·
    theta^(k / (K - 1)), k < K = width // 6, frequency-major with the three axes interleaved. The width - 6K elements
    that remain come first and are not rotated. Angles reach 15708, so they are computed in fp32 for every model dtype.
    """
    num_frequencies = width // 6
    frequencies = theta ** torch.linspace(0.0, 1.0, num_frequencies, dtype=torch.float32, device=positions.device)
    fractions = positions.float() / torch.tensor(max_positions, device=positions.device)[None, :, None]
    angles = (frequencies * (math.pi / 2)) * (2 * fractions - 1).transpose(1, 2)[..., None]  # (B, N, 3, K)
    angles = angles.transpose(2, 3).flatten(2)
    unrotated = angles.new_zeros(*angles.shape[:2], width // 2 - 3 * num_frequencies)
    angles = torch.cat([unrotated, angles], dim=-1)
    rotation = angles.new_empty(*angles.shape, 2)
    torch.cos(angles, out=rotation[..., 0])
    torch.sin(angles, out=rotation[..., 1])
    return Rope(rotation)
