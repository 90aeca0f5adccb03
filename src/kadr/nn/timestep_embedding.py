"""Sinusoidal timestep embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kadr.nn.linear import Linear

SINUSOID_WIDTH = 256


def sinusoidal_embedding(timestep: Tensor, width: int = SINUSOID_WIDTH) -> Tensor:
    """Embeds timestep (N), fp32 -> (N, width), fp32: cosines of timestep / 10000^(k / half), k < half, then sines.

    half = width / 2. The exponent is divided by half and not by half - 1 (`downscale_freq_shift` 0), and the cosines
    come first.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(10000.0) / half)
    angle = timestep.float()[:, None] * exponent.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Embeds a timestep, which is a scaled sigma, (N) -> (N, width): sinusoid, linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(SINUSOID_WIDTH, width)
        self.linear_2 = Linear(width, width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoidal_embedding(timestep).to(dtype))))
