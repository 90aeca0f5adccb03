"""Normalisations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pixel_norm(x: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Divide each position of x (B, C, ...) by the root mean square of its channels, in x's own dtype."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + epsilon)


def rms_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide x (..., D) by its root mean square over D; the mean square in fp32, as the official RMSNorm has it."""
    if x.dtype == torch.float32:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm with a learned weight (D)."""

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
