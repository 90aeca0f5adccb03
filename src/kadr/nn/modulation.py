"""adaLN-single: the timestep modulates branches of a transformer block by scale, shift and gate.

As in PixArt-alpha (Chen et al. 2023, arXiv:2310.00426).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kadr.nn.init import init_normal


class AdaLNParams(NamedTuple):
    """Shift, scale and gate of one branch, each (B, 1 or N, D). Called on x, it scales and shifts."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, 1 + self.scale)


def init_scale_shift_table(rows: int, width: int) -> nn.Parameter:
    """Returns a learned table (rows, width) with its values before training. It is added to the timestep embedding."""
    table = init_normal(rows, width)
    return nn.Parameter(table if table.is_meta else table * width**-0.5)


def compute_adaln_params(table: Tensor, embedding: Tensor) -> tuple[AdaLNParams, AdaLNParams]:
    """Adds table (6, D) to embedding (B, 1 or N, 6, D): modulation of self-attention, and of the feed-forward."""
    rows = (table + embedding).unbind(-2)
    return AdaLNParams(*rows[:3]), AdaLNParams(*rows[3:])
