"""Conditions: functions from a latent state to a latent state.

An image or clip at the beginning of the video, and the later latents of a clip anywhere, replace the video's own
tokens. The first latents of a clip that begins later were encoded as the beginning of a video, so they fit nowhere in
the latent grid: they are appended as keyframe tokens, whose positions say when they are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kadr.sampling.state import SIGMA_TOLERANCE, LatentState, to_latents, to_tokens

# Latent frames of a clip that depend on where it begins: the first, and the one that looks back at it.
PREFIX_LATENT_FRAMES = 2


def replace_latents(
    state: LatentState, latents: Tensor, strength: float, *, origin: tuple[int, int, int] = (0, 0, 0)
) -> LatentState:
    """Puts latents (B, C, n, h, w) into the video and conditions on them with `strength` in (0, 1].

    Below 1 the tokens start at the point of the flow with sigma 1 - strength, and stay there until the sampler gets
    down to that sigma.

    Args:
        origin: latent frame, row and column of the video at which the latents begin.
    """
    video = state.grid.num_tokens
    (frame, row, column), (frames, rows, columns) = origin, latents.shape[2:]
    region = (..., slice(frame, frame + frames), slice(row, row + rows), slice(column, column + columns))
    video_latents = to_latents(state.tokens[:, :video], state.grid).clone()
    video_latents[region] = torch.lerp(video_latents[region], latents.to(video_latents), strength)
    tokens = torch.cat([to_tokens(video_latents), state.tokens[:, video:]], dim=1)
    mask = _condition_region(state, region, strength)
    return replace(state, tokens=tokens, clean_tokens=tokens, conditioning_mask=mask)


def _condition_region(state: LatentState, region: tuple[Any, ...], strength: float) -> Tensor:
    """Returns the conditioning mask of `state` with `strength` in a region of the video's latents."""
    video, mask = state.grid.num_tokens, _conditioning_mask(state)
    video_mask = to_latents(mask[:, :video, None], state.grid).clone()
    video_mask[region] = strength
    return torch.cat([to_tokens(video_mask)[..., 0], mask[:, video:]], dim=1)


def append_keyframe(
    state: LatentState, latents: Tensor, positions: Tensor, strength: float, noise: Tensor
) -> LatentState:
    """Appends latents (B, C, n, h, w) as tokens behind the video's, conditioned with `strength` in (0, 1].

    Args:
        positions: (3, n·h·w) of the appended tokens.
        noise: shaped as `latents`; with a strength below 1 the tokens start with 1 - strength of it.
    """
    keyframe = to_tokens(torch.lerp(noise.to(state.tokens), latents.to(state.tokens), strength))
    tokens = torch.cat([state.tokens, keyframe], dim=1)
    mask = torch.cat([_conditioning_mask(state), torch.full_like(keyframe[..., 0], strength)], dim=1)
    all_positions = torch.cat([state.positions, positions.to(state.positions)], dim=1)
    return replace(state, tokens=tokens, clean_tokens=tokens, positions=all_positions, conditioning_mask=mask)


def insert_clip(
    state: LatentState, latents: Tensor, positions: Tensor, strength: float, noise: Tensor, *, latent_frame: int
) -> LatentState:
    """Puts a clip's latents (B, C, n, h, w), n at least 2, into the middle of the video.

    The first two become keyframe tokens; the others replace the video's from latent frame `latent_frame` + 2 on.

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
    """Returns a `prepare` of a sampler that adds noise_scale · sigma² · noise to the fully conditioned tokens.

    The network is still told they are clean (sigma 0). The noise keeps an image from freezing the motion around it.

    Args:
        noise_scale: image_cond_noise_scale of the official package; 0 adds nothing.
        draw: (step index, shape) -> standard normal noise.
    """

    def prepare(index: int, state: LatentState, sigma: Tensor) -> LatentState:
        if state.conditioning_mask is None or not noise_scale:
            return state
        noise = draw(index, state.tokens.shape).to(state.tokens)
        return _add_to_clean_tokens(state, state.conditioning_mask, noise_scale * sigma**2 * noise)

    return prepare


def _add_to_clean_tokens(state: LatentState, mask: Tensor, noise: Tensor) -> LatentState:
    """Adds noise (B, N, C) to the clean value of the tokens that are fully conditioned by `mask` (B, N)."""
    noisy = state.clean_tokens + noise
    is_clean = (mask > 1.0 - SIGMA_TOLERANCE)[..., None]
    return replace(state, tokens=torch.where(is_clean, noisy, state.tokens))


def _conditioning_mask(state: LatentState) -> Tensor:
    return torch.zeros_like(state.tokens[..., 0]) if state.conditioning_mask is None else state.conditioning_mask
