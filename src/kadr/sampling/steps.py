"""One step along the flow: tokens (B, N, C), velocity and levels (B, 1 or N) to the tokens one level down."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.sampling.state import SIGMA_TOLERANCE

SamplerStep = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]  # index, tokens, velocity, level, path -> tokens


def next_sigma(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """For every level, the highest level of `sigmas` (S + 1; it ends in 0) that lies below it; 0 below the lowest."""
    sigmas = sigmas[:, None, None]
    return torch.where(sigmas < sigma - SIGMA_TOLERANCE, sigmas, 0.0).amax(dim=0)


def euler_step(index: int, tokens: Tensor, velocity: Tensor, sigma: Tensor, sigmas: Tensor) -> Tensor:
    """Straight along the velocity to the next level. A token whose level is not on the path lands on it."""
    return tokens - (sigma - next_sigma(sigma, sigmas))[..., None] * velocity


def stochastic_step(draw: Callable[[int, torch.Size], Tensor]) -> SamplerStep:
    """Steps that guess the clean tokens and add fresh noise: `draw(index, shape)` gives it."""

    def step(index: int, tokens: Tensor, velocity: Tensor, level: Tensor, path: Tensor) -> Tensor:
        clean = tokens - level[..., None] * velocity
        then = next_sigma(level, path)[..., None]
        return (1 - then) * clean + then * draw(index, tokens.shape).to(tokens)

    return step
