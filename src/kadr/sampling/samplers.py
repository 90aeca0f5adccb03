"""The loop. It knows a velocity, a state, a list of levels and a step; what guides or conditions them plugs in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.sampling.guidance import Denoiser
from kadr.sampling.state import LatentState
from kadr.sampling.steps import SamplerStep, euler_step

PrepareState = Callable[[int, LatentState, Tensor], LatentState]
WatchStep = Callable[[int, Tensor, LatentState], None]


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
