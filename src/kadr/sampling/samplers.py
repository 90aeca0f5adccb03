"""Samplers: one step along the flow, and the loop over a schedule of sigmas.

The loop knows a denoiser, a state, sigmas and a step; guidance, conditions and caching plug in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.sampling.guidance import Denoiser
from kadr.sampling.state import SIGMA_TOLERANCE, LatentState

SamplerStep = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]  # index, tokens, velocity, level, path -> tokens
PrepareState = Callable[[int, LatentState, Tensor], LatentState]
WatchStep = Callable[[int, Tensor, LatentState], None]


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


def denoise(
    denoiser: Denoiser,
    state: LatentState,
    sigmas: Tensor,
    *,
    step: SamplerStep = euler_step,
    prepare: PrepareState = lambda index, state, now: state,
    watch: WatchStep = lambda index, now, state: None,
) -> LatentState:
    """Carry a state from noise to picture.

    Args:
        denoiser: step, tokens (B, N, C), level (B, 1 or N) -> velocity (B, N, C).
        sigmas: (S) fp32, falling; after the last comes 0.
        step: how tokens move.
        prepare: changes the state before each estimate.
        watch: sees each step's index, level and outcome.
    """
    path = torch.cat([sigmas, sigmas.new_zeros(1)])
    for index, now in enumerate(sigmas):
        state = prepare(index, state, now)
        level = state.sigma_per_token(now)
        velocity = denoiser(index, state.tokens, level).to(state.tokens.dtype)
        state = state.advance(step(index, state.tokens, velocity, level, path), now)
        watch(index, now, state)
    return state
