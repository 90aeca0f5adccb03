"""Conditions applied to a latent state, as LTXVideoPipeline.prepare_conditioning of the official package does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.request.pass_media import PassCondition
from kadr.request.passes import ResolvedPass
from kadr.sampling.conditioning import PREFIX_LATENT_FRAMES, append_keyframe, insert_clip, replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState
from kadr.shapes import TEMPORAL_COMPRESSION, LatentGrid


def apply_condition(
    state: LatentState,
    condition: PassCondition,
    latents: Tensor,
    resolved_pass: ResolvedPass,
    *,
    causal: bool,
    draw_noise: Callable[[torch.Size], Tensor],
) -> LatentState:
    """Returns the state with a condition applied: at frame 0 it replaces latents, elsewhere it appends tokens.

    Args:
        latents: normalised latents (1, C, n, h, w) of `condition.frames`.
        draw_noise: draws the noise of appended tokens.
    """
    strength, start = condition.resolved_condition.condition.strength, condition.resolved_condition.start_frame
    if start == 0:
        top, bottom, left, right = condition.latent_crop
        row, column = condition.latent_offset
        inner = latents[..., top : latents.shape[-2] - bottom, left : latents.shape[-1] - right]
        return replace_latents(state, inner, strength, origin=(0, row + top, column + left))
    prefix = latents[:, :, :PREFIX_LATENT_FRAMES]
    grid = LatentGrid(*prefix.shape[2:])
    positions = token_positions(grid, fps=resolved_pass.fps, causal=causal, first_frame=start)
    if latents.shape[2] == 1:
        return append_keyframe(state, latents, positions, strength, draw_noise(prefix.shape))
    return insert_clip(
        state, latents, positions, strength, draw_noise(prefix.shape), latent_frame=start // TEMPORAL_COMPRESSION
    )
