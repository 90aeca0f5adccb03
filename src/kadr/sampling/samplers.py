"""Samplers of the flow ODE: Euler and stochastic steps, and the loop over a schedule of sigmas.

The loop knows a denoiser, a state, sigmas and a step; guidance, conditions and caching plug in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.sampling.guidance import Denoiser
from kadr.sampling.state import SIGMA_TOLERANCE, LatentState

# index, tokens, velocity, sigma, sigmas with the final 0 -> tokens
SamplerStep = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
PrepareState = Callable[[int, LatentState, Tensor], LatentState]  # index, state, sigma -> state
WatchStep = Callable[[int, Tensor, LatentState], None]  # index, sigma, state


def next_sigma(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """Returns, for every sigma, the highest of `sigmas` (S + 1; the last is 0) that lies below it; else 0."""
    sigmas = sigmas[:, None, None]
    return torch.where(sigmas < sigma - SIGMA_TOLERANCE, sigmas, 0.0).amax(dim=0)


def euler_step(index: int, tokens: Tensor, velocity: Tensor, sigma: Tensor, sigmas: Tensor) -> Tensor:
    """Moves each token along the velocity to the next of `sigmas` below its own: an Euler step of the flow ODE."""
    return tokens - (sigma - next_sigma(sigma, sigmas))[..., None] * velocity


def stochastic_step(draw: Callable[[int, torch.Size], Tensor]) -> SamplerStep:
    """Returns a step that predicts the clean tokens and adds fresh noise from `draw(index, shape)` to them."""

    def step(index: int, tokens: Tensor, velocity: Tensor, sigma: Tensor, sigmas: Tensor) -> Tensor:
        clean = tokens - sigma[..., None] * velocity
        following = next_sigma(sigma, sigmas)[..., None]
        return (1 - following) * clean + following * draw(index, tokens.shape).to(tokens)

    return step


def denoise(
    denoiser: Denoiser,
    state: LatentState,
    sigmas: Tensor,
    *,
    step: SamplerStep = euler_step,
    prepare: PrepareState = lambda index, state, sigma: state,
    watch: WatchStep = lambda index, sigma, state: None,
) -> LatentState:
    """Integrates the flow ODE from sigmas[0] to 0.

    Args:
        denoiser: step, tokens (B, N, C), sigma (B, 1 or N) -> velocity (B, N, C).
        sigmas: (S) fp32, decreasing, without the final 0.
        step: how tokens move.
        prepare: changes the state before each model evaluation.
        watch: called after each step with its index, its sigma and the new state.
    """
    all_sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    for index, sigma in enumerate(sigmas):
        state = prepare(index, state, sigma)
        token_sigmas = state.sigma_per_token(sigma)
        velocity = denoiser(index, state.tokens, token_sigmas).to(state.tokens.dtype)
        state = state.advance(step(index, state.tokens, velocity, token_sigmas, all_sigmas), sigma)
        watch(index, sigma, state)
    return state
