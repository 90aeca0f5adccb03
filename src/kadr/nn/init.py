"""Weights before training."""

from __future__ import annotations

import torch
from torch import Tensor


def init_normal(*shape: int) -> Tensor:
    """`torch.randn`, but on the meta device nothing is drawn: torch would load its compiler for it, a second."""
    made = torch.empty(*shape)
    return made if made.is_meta else made.normal_()
