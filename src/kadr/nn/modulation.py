"""How a noise level bends a branch of a transformer layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kadr.nn.init import init_normal


class AdaLNParams(NamedTuple):
    """Shift, scale and gate, each (B, 1 or N, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, 1 + self.scale)


def init_scale_shift_table(rows: int, width: int) -> nn.Parameter:
    """Rows that are added to what the noise level says, (rows, width), as they are before training."""
    drawn = init_normal(rows, width)
    return nn.Parameter(drawn if drawn.is_meta else drawn * width**-0.5)


def compute_adaln_params(table: Tensor, embedding: Tensor) -> tuple[AdaLNParams, AdaLNParams]:
    """table (6, D) + embedding (B, 1 or N, 6, D) -> the bends around self-attention and around the feed-forward."""
    rows = (table + embedding).unbind(-2)
    return AdaLNParams(*rows[:3]), AdaLNParams(*rows[3:])
