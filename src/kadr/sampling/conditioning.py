"""Conditions: each maps a state to a state.

A picture or clip at the beginning of the video, and the later latents of a clip anywhere, take the place of the video's
own tokens. The first latents of a clip that begins later were encoded as if a video began there, so they fit no place
of the grid: they stand behind the video as tokens of their own, with positions that say where they belong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kadr.sampling.state import CLOSE, LatentState, to_latents, to_tokens

PREFIX = 2  # latent frames of a clip that know of its beginning: the first, and the one that looks back at it


def hold(state: LatentState, latents: Tensor, strength: float, *, at: tuple[int, int, int] = (0, 0, 0)) -> LatentState:
    """Put latents (B, C, n, h, w) into the video and hold them with `strength` in (0, 1].

    Below 1 the tokens start as the flow would have them at level 1 - strength, and stay until the sampling is there.

    Args:
        at: latent frame, row and column of the video at which their first one stands.
    """
    video = state.grid.num_tokens
    (frame, row, column), (frames, rows, columns) = at, latents.shape[2:]
    region = (..., slice(frame, frame + frames), slice(row, row + rows), slice(column, column + columns))
    tokens = to_latents(state.tokens[:, :video], state.grid).clone()
    tokens[region] = torch.lerp(tokens[region], latents.to(tokens), strength)
    before = _strength(state)
    held = to_latents(before[:, :video, None], state.grid).clone()
    held[region] = strength
    packed = torch.cat([to_tokens(tokens), state.tokens[:, video:]], dim=1)
    kept = torch.cat([to_tokens(held)[..., 0], before[:, video:]], dim=1)
    return replace(state, tokens=packed, given=packed, strength=kept)


def append(state: LatentState, latents: Tensor, positions: Tensor, strength: float, noise: Tensor) -> LatentState:
    """Add latents (B, C, n, h, w) as tokens behind the video's, and hold them with `strength` in (0, 1].

    Args:
        positions: (3, n·h·w) of the added tokens.
        noise: shaped as `latents`; with a strength below 1 they start with so much of it.
    """
    added = to_tokens(torch.lerp(noise.to(state.tokens), latents.to(state.tokens), strength))
    tokens = torch.cat([state.tokens, added], dim=1)
    kept = torch.cat([_strength(state), torch.full_like(added[..., 0], strength)], dim=1)
    where = torch.cat([state.positions, positions.to(state.positions)], dim=1)
    return replace(state, tokens=tokens, given=tokens, positions=where, strength=kept)


def join(
    state: LatentState, latents: Tensor, positions: Tensor, strength: float, noise: Tensor, *, frame: int
) -> LatentState:
    """Put a clip's latents (B, C, n, h, w) into the middle of the video, n at least 2.

    The first two become tokens of their own, the others take the place of the video's from latent frame `frame` + 2 on.

    Args:
        positions: (3, 2·h·w) of the first two.
        noise: shaped as the first two.
        frame: latent frame of the video at which the clip begins, 1 or later.
    """
    if latents.shape[2] > PREFIX:
        state = hold(state, latents[:, :, PREFIX:], strength, at=(frame + PREFIX, 0, 0))
    return append(state, latents[:, :, :PREFIX], positions, strength, noise)


def shake(scale: float, draw: Callable[[int, torch.Size], Tensor]) -> Callable[[int, LatentState, Tensor], LatentState]:
    """Before each step, move the fully held tokens off what was given by scale · level² · noise.

    The network is still told that they are clean: this keeps a held picture from freezing the motion around it.
    """

    def prepare(index: int, state: LatentState, now: Tensor) -> LatentState:
        if state.strength is None or not scale:
            return state
        noise = draw(index, state.tokens.shape).to(state.tokens)
        shaken = state.given + scale * now**2 * noise
        held = (state.strength > 1.0 - CLOSE)[..., None]
        return replace(state, tokens=torch.where(held, shaken, state.tokens))

    return prepare


def _strength(state: LatentState) -> Tensor:
    return torch.zeros_like(state.tokens[..., 0]) if state.strength is None else state.strength
