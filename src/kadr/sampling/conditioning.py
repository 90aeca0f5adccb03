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

from kadr.sampling.state import SIGMA_TOLERANCE, LatentState, to_latents, to_tokens

PREFIX_LATENT_FRAMES = (
    2  # latent frames of a clip that know of its beginning: the first, and the one that looks back at it
)


def replace_latents(
    state: LatentState, latents: Tensor, strength: float, *, origin: tuple[int, int, int] = (0, 0, 0)
) -> LatentState:
    """Put latents (B, C, n, h, w) into the video and hold them with `strength` in (0, 1].

    Below 1 the tokens start as the flow would have them at level 1 - strength, and stay until the sampling is there.

    Args:
        origin: latent frame, row and column of the video at which their first one stands.
    """
    video = state.grid.num_tokens
    (frame, row, column), (frames, rows, columns) = origin, latents.shape[2:]
    region = (..., slice(frame, frame + frames), slice(row, row + rows), slice(column, column + columns))
    tokens = to_latents(state.tokens[:, :video], state.grid).clone()
    tokens[region] = torch.lerp(tokens[region], latents.to(tokens), strength)
    before = _conditioning_mask(state)
    held = to_latents(before[:, :video, None], state.grid).clone()
    held[region] = strength
    packed = torch.cat([to_tokens(tokens), state.tokens[:, video:]], dim=1)
    kept = torch.cat([to_tokens(held)[..., 0], before[:, video:]], dim=1)
    return replace(state, tokens=packed, clean_tokens=packed, conditioning_mask=kept)


def append_keyframe(
    state: LatentState, latents: Tensor, positions: Tensor, strength: float, noise: Tensor
) -> LatentState:
    """Add latents (B, C, n, h, w) as tokens behind the video's, and hold them with `strength` in (0, 1].

    Args:
        positions: (3, n·h·w) of the added tokens.
        noise: shaped as `latents`; with a strength below 1 they start with so much of it.
    """
    added = to_tokens(torch.lerp(noise.to(state.tokens), latents.to(state.tokens), strength))
    tokens = torch.cat([state.tokens, added], dim=1)
    kept = torch.cat([_conditioning_mask(state), torch.full_like(added[..., 0], strength)], dim=1)
    where = torch.cat([state.positions, positions.to(state.positions)], dim=1)
    return replace(state, tokens=tokens, clean_tokens=tokens, positions=where, conditioning_mask=kept)


def insert_clip(
    state: LatentState, latents: Tensor, positions: Tensor, strength: float, noise: Tensor, *, latent_frame: int
) -> LatentState:
    """Put a clip's latents (B, C, n, h, w) into the middle of the video, n at least 2.

    The first two become tokens of their own, the others take the place of the video's from latent frame `latent_frame` + 2 on.

    Args:
        positions: (3, 2·h·w) of the first two.
        noise: shaped as the first two.
        latent_frame: latent frame of the video at which the clip begins, 1 or later.
    """
    if latents.shape[2] > PREFIX_LATENT_FRAMES:
        state = replace_latents(
            state, latents[:, :, PREFIX_LATENT_FRAMES:], strength, origin=(latent_frame + PREFIX_LATENT_FRAMES, 0, 0)
        )
    return append_keyframe(state, latents[:, :, :PREFIX_LATENT_FRAMES], positions, strength, noise)


def add_image_noise(
    noise_scale: float, draw: Callable[[int, torch.Size], Tensor]
) -> Callable[[int, LatentState, Tensor], LatentState]:
    """Before each step, move the fully held tokens off what was given by scale · level² · noise.

    The network is still told that they are clean: this keeps a held picture from freezing the motion around it.
    """

    def prepare(index: int, state: LatentState, now: Tensor) -> LatentState:
        if state.conditioning_mask is None or not noise_scale:
            return state
        noise = draw(index, state.tokens.shape).to(state.tokens)
        shaken = state.clean_tokens + noise_scale * now**2 * noise
        held = (state.conditioning_mask > 1.0 - SIGMA_TOLERANCE)[..., None]
        return replace(state, tokens=torch.where(held, shaken, state.tokens))

    return prepare


def _conditioning_mask(state: LatentState) -> Tensor:
    return torch.zeros_like(state.tokens[..., 0]) if state.conditioning_mask is None else state.conditioning_mask
