"""Rotary positions over fractions of time, height and width."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kadr.kernels.reference import apply_rope


class Rope(NamedTuple):
    """Cosine and sine of every angle, each (B, N, D), or (1, N, D) for all samples, with equal neighbours in pairs."""

    cosine: Tensor
    sine: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the pairs (0, 1), (2, 3), ... of x (B, N, D)."""
        return apply_rope(x, self.cosine, self.sine)

    def for_samples(self, samples: slice) -> Rope:
        """Of some samples of the batch."""
        return self if len(self.cosine) == 1 else Rope(self.cosine[samples], self.sine[samples])


def rope_table(
    positions: Tensor, width: int, *, max_positions: tuple[float, float, float], theta: float, dtype: torch.dtype
) -> Rope:
    """The table for tokens at positions (B, 3, N), fp32: seconds, then pixels down, then pixels right.

    A position becomes a fraction p of its limit (20 s, 2048 px, 2048 px); the angles are 2p - 1 times pi/2 · theta^(k
    / (K - 1)), k < K = width // 6, frequency-major with the three axes interleaved. What 6K leaves of the width is
    unrotated and stands in front. Angles reach 15708, so they are computed in fp32 whatever the dtype of the model.
    """
    count = width // 6
    frequencies = theta ** torch.linspace(0.0, 1.0, count, dtype=torch.float32, device=positions.device)
    fractions = positions.float() / torch.tensor(max_positions, device=positions.device)[None, :, None]
    angles = (frequencies * (math.pi / 2)) * (2 * fractions - 1).transpose(1, 2)[..., None]  # (B, N, 3, K)
    angles = angles.transpose(2, 3).flatten(2).repeat_interleave(2, dim=-1)
    front = angles.new_zeros(*angles.shape[:2], width - 6 * count)
    angles = torch.cat([front, angles], dim=-1)
    return Rope(angles.cos().to(dtype), angles.sin().to(dtype))
