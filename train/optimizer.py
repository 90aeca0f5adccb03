"""Muon for the matrices, AdamW for the rest.

Muon (K. Jordan et al. 2024) makes each step of a matrix orthogonal, so that weak directions, colour among them, are
learned as fast as strong ones. In this world it takes the VAE in 200 steps to where AdamW is after thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW:
    """Both optimizers as one. A convolution counts as the matrix (channels out, channels in x taps).

    Args:
        uses_muon: which parameters of two or more axes Muon takes, by name.
        muon_lr, adamw_lr: peak learning rates; Muon's is scaled to the update size of AdamW.
    """

    def __init__(self, model: nn.Module, *, uses_muon: Callable[[str], bool], muon_lr: float, adamw_lr: float) -> None:
        named = dict(model.named_parameters())
        self._matrices = [p for name, p in named.items() if p.ndim >= 2 and uses_muon(name)]
        self._flat = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in self._matrices]  # the same memory
        others = [p for name, p in named.items() if not (p.ndim >= 2 and uses_muon(name))]
        self._parts = (
            torch.optim.Muon(self._flat, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self._rates = (muon_lr, adamw_lr)
        self._model = model

    def step(self, lr_multiplier: float) -> None:
        """Clip the gradients to norm 1, step at `lr_multiplier` of the peak rates, and forget the gradients."""
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for flat, matrix in zip(self._flat, self._matrices, strict=True):
            flat.grad = None if matrix.grad is None else matrix.grad.view(flat.shape)
        for part, rate in zip(self._parts, self._rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * lr_multiplier
            part.step()
        self._model.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._parts[0].state_dict(), "adamw": self._parts[1].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._parts[0].load_state_dict(state["muon"])
        self._parts[1].load_state_dict(state["adamw"])


def lr_multiplier(step: int, steps: int, *, warmup: int, decay: float) -> float:
    """Warm up, hold, then fall linearly over the last `decay` of the steps to 1 %."""
    return min(1.0, (step + 1) / warmup, max(0.01, (steps - step) / (decay * steps)))
