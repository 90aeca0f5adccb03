"""Conditions: each maps a state to a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kadr.sampling.state import CLOSE, LatentState, to_latents, to_tokens


def hold_first(state: LatentState, latents: Tensor, strength: float) -> LatentState:
    """Put `latents` (B, C, n, h, w) at the beginning of the video and hold them with `strength` in (0, 1].

    Below 1 the tokens start as the flow would have them at level 1 - strength, and stay until the sampling is there.
    """
    count = latents.shape[2]
    tokens = to_latents(state.tokens, state.grid).clone()
    tokens[:, :, :count] = torch.lerp(tokens[:, :, :count], latents.to(tokens), strength)
    before = torch.zeros_like(state.tokens[..., 0]) if state.strength is None else state.strength
    held = to_latents(before[..., None], state.grid).clone()
    held[:, :, :count] = strength
    packed = to_tokens(tokens)
    return replace(state, tokens=packed, given=packed, strength=to_tokens(held)[..., 0])


def shake(scale: float, draw: Callable[[int, torch.Size], Tensor]) -> Callable[[int, LatentState, Tensor], LatentState]:
    """Before each step, move the fully held tokens off what was given by scale · level² · noise.

    The network is still told that they are clean: this keeps a held picture from freezing the motion around it.
    """

    def prepare(index: int, state: LatentState, now: Tensor) -> LatentState:
        if state.strength is None:
            return state
        noise = draw(index, state.tokens.shape).to(state.tokens)
        shaken = state.given + scale * now**2 * noise
        held = (state.strength > 1.0 - CLOSE)[..., None]
        return replace(state, tokens=torch.where(held, shaken, state.tokens))

    return prepare
