"""Weights before training."""

from __future__ import annotations

import torch
from torch import Tensor


def init_normal(*shape: int) -> Tensor:
    """Returns `torch.randn(*shape)`; draws nothing on the meta device, where torch would load its compiler (1 s)."""
    weight = torch.empty(*shape)
    return weight if weight.is_meta else weight.normal_()
