"""Conditions at the size of a pass: prepared piece by piece as the encoder takes them, and put into a state.

Placement follows LTXVideoPipeline.prepare_conditioning of the official package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.media.clip import ClipReader
from kadr.media.image import prepare_image
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.request.resolved_conditions import Box, Frames, ResolvedCondition, conditions_intersect
from kadr.sampling.conditioning import PREFIX_LATENT_FRAMES, append_keyframe, insert_clip, replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid, Size


@dataclass(frozen=True)
class PreparedFrames:
    """Pictures as the encoder is given them: prepared when they are asked for, and not kept.

    Args:
        frames: 8k+1 of them.
        size, crf, sampled_size, resize: see `prepare_image`.
        image_tensor: what a single picture comes to, float32 (1, 3, 1, H, W); it is prepared at once.
    """

    frames: Frames
    size: Size
    crf: int
    sampled_size: Size
    resize: bool = False
    image_tensor: Tensor | None = None

    @classmethod
    def from_frames(
        cls, frames: Frames, size: Size, crf: int, sampled_size: Size, *, resize: bool = False
    ) -> PreparedFrames:
        """The first one is prepared here, so that what cannot be is known before anything is computed.

        Raises:
            MediaError: see `prepare_image`.
        """
        first = frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
        made_of_it = prepare_image(first, size, crf, sampled_size, resize=resize)
        single = len(frames) == 1 and not isinstance(frames, ClipReader)
        return cls(frames, size, crf, sampled_size, resize, made_of_it if single else None)

    @property
    def grid(self) -> LatentGrid:
        """Of their latents."""
        return LatentGrid.for_video(self.sampled_size, len(self.frames))

    def chunks(self, chunk_frames: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """`chunk_frames` pictures at a time, the last ones perhaps fewer: (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file was changed since it was opened.
        """
        if self.image_tensor is not None:
            yield self.image_tensor.to(device, dtype)
            return
        prepared = (prepare_image(f, self.size, self.crf, self.sampled_size, resize=self.resize) for f in self.frames)
        for start in range(0, len(self.frames), chunk_frames):
            yield self._stack_chunk(prepared, min(chunk_frames, len(self.frames) - start)).to(device, dtype)

    def _stack_chunk(self, images: Iterator[Tensor], chunk_frames: int) -> Tensor:
        chunk = torch.empty(1, 3, chunk_frames, self.sampled_size.height, self.sampled_size.width)
        for place, picture in enumerate(islice(images, chunk_frames)):
            chunk[:, :, place] = picture[:, :, 0]
        return chunk


@dataclass(frozen=True)
class PreparedCondition:
    """A condition at the size of a pass.

    Args:
        pixels: what the encoder is given of it.
        latent_offset: row and column of the latent grid at which it lies, before its margins are cut.
        latent_crop: latents that are cut off: top, bottom, left and right. Those at an edge that is not the video's have seen
            its grey outside, and look like it.
    """

    resolved_condition: ResolvedCondition
    pixels: PreparedFrames
    latent_offset: tuple[int, int] = (0, 0)
    latent_crop: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def grid(self) -> LatentGrid:
        """Of its latents."""
        return self.pixels.grid


def count_appended_tokens(condition: PreparedCondition) -> int:
    """How many tokens of its own a condition has behind the video's; see `apply_condition`."""
    grid = condition.grid
    return (
        0
        if condition.resolved_condition.start_frame == 0
        else min(grid.frames, PREFIX_LATENT_FRAMES) * grid.height * grid.width
    )


def place_in_pass(
    conditions: Sequence[ResolvedCondition], request: Request, resolved_pass: ResolvedPass
) -> list[ResolvedCondition]:
    """The conditions where they stand in one pass.

    Raises:
        RequestError: a box does not lie inside the video, or nothing would be left of it; or the pass makes every
            second frame, and there is a clip, whose frames do not fall on its own, or two pictures fall on one of them.
    """
    made = list(conditions)
    if resolved_pass.fps != request.fps:
        made = [_at_half_rate(item) for item in conditions]
        for one, other in combinations(range(len(made)), 2):
            if conditions_intersect(made[one], made[other]):
                raise RequestError(
                    f"two pictures fall on one frame of the first pass, which makes every second frame only: "
                    f"{conditions[one]} and {conditions[other]}. Move one of them, or leave out the temporal upscaler."
                )
    for item in made:
        if item.condition.box is not None:
            _latent_box(item.condition.box, request, resolved_pass)
    return made


def _at_half_rate(condition: ResolvedCondition) -> ResolvedCondition:
    """The condition in a pass that makes every second frame."""
    if len(condition.frames) > 1:
        raise RequestError(
            f"{condition.condition.media} is a clip, and the first pass makes every second frame only. Give pictures, or "
            "leave out the temporal upscaler."
        )
    return replace(condition, start_frame=condition.start_frame // 2)


def prepare_condition(condition: ResolvedCondition, request: Request, resolved_pass: ResolvedPass) -> PreparedCondition:
    """The condition for one pass, in which it is settled.

    Raises:
        MediaError: it is too small for the size.
    """
    assert isinstance(request.size, Size)
    assert request.image_crf is not None
    if condition.condition.box is None:
        return PreparedCondition(
            condition, PreparedFrames.from_frames(condition.frames, request.size, request.image_crf, resolved_pass.size)
        )
    size, corner, cut = _latent_box(condition.condition.box, request, resolved_pass)
    return PreparedCondition(
        condition, PreparedFrames.from_frames(condition.frames, size, request.image_crf, size), corner, cut
    )


def _latent_box(
    box: Box, request: Request, resolved_pass: ResolvedPass
) -> tuple[Size, tuple[int, int], tuple[int, int, int, int]]:
    """What a box becomes in a pass: its size in pixels, and its corner and what is cut of it as in `PreparedCondition`."""
    assert isinstance(request.size, Size)
    row, column, height, width = _snap_box_to_grid(box, request.size, resolved_pass.grid)
    size = Size(width * SPATIAL_COMPRESSION, height * SPATIAL_COMPRESSION)
    cut = (
        int(row > 0),
        int(row + height < resolved_pass.grid.height),
        int(column > 0),
        int(column + width < resolved_pass.grid.width),
    )
    if height <= cut[0] + cut[1] or width <= cut[2] + cut[3]:
        made = request.size.snap()
        least = math.ceil(
            3 * max(made.width / resolved_pass.grid.width, made.height / resolved_pass.grid.height)
        )  # latents of this pass
        raise RequestError(
            f"box {box} covers {size} pixels of a pass at {resolved_pass.size}: with its margins cut off, nothing is left. "
            f"Give at least {least} pixels each way, or place it at the edge."
        )
    return size, (row, column), cut


def _snap_box_to_grid(box: Box, size: Size, grid: LatentGrid) -> Box:
    """Row, column, height and width in latents, the nearest to a box in pixels of a video of `size`."""
    x, y, width, height = box
    if x + width > size.width or y + height > size.height:
        raise RequestError(f"box {box} reaches outside the video, which is {size}.")
    left, _, top, _ = size.padding()
    made = size.snap()
    across, down = grid.width / made.width, grid.height / made.height
    column, row = _round_half_up((x + left) * across), _round_half_up((y + top) * down)
    right, bottom = _round_half_up((x + width + left) * across), _round_half_up((y + height + top) * down)
    return row, column, max(bottom - row, 1), max(right - column, 1)


def _round_half_up(position: float) -> int:
    """Halves go up, always: as `round` has them, a box of three would be two or four wide, by where it stands."""
    return math.floor(position + 0.5)


def apply_condition(
    state: LatentState,
    condition: PreparedCondition,
    latents: Tensor,
    resolved_pass: ResolvedPass,
    *,
    causal: bool,
    draw_noise: Callable[[torch.Size], Tensor],
) -> LatentState:
    """The state with a condition in it.

    Args:
        latents: (1, C, n, h, w), normalised, of `condition.pixels`.
        draw_noise: noise for latents that become tokens of their own.
    """
    strength, start = condition.resolved_condition.condition.strength, condition.resolved_condition.start_frame
    if start == 0:
        top, bottom, left, right = condition.latent_crop
        row, column = condition.latent_offset
        inner = latents[..., top : latents.shape[-2] - bottom, left : latents.shape[-1] - right]
        return replace_latents(state, inner, strength, origin=(0, row + top, column + left))
    own = latents[:, :, :PREFIX_LATENT_FRAMES]
    grid = LatentGrid(*own.shape[2:])
    where = token_positions(grid, fps=resolved_pass.fps, causal=causal, first_frame=start)
    if latents.shape[2] == 1:
        return append_keyframe(state, latents, where, strength, draw_noise(own.shape))
    return insert_clip(
        state, latents, where, strength, draw_noise(own.shape), latent_frame=start // TEMPORAL_COMPRESSION
    )
