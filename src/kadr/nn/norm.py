"""RMSNorm, and LayerNorm over channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kadr.kernels.reference import rms_norm


class RMSNorm(nn.Module):
    """RMS norm over the last axis, with a learned weight (D)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.epsilon) * self.weight


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of x (B, C, F, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
