"""Conditions prepared for a pass: read chunk by chunk as the encoder takes them, then applied to a latent state.

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
    """Frames for the VAE encoder, prepared when the encoder reads them, and not kept.

    Args:
        frames: 8k+1 frames.
        size, crf, sampled_size, resize: see `prepare_image`.
        image_tensor: a single image, prepared at once: float32 (1, 3, 1, H, W); None for a clip.
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
        """Wraps frames, and prepares the first one now, so that unusable ones are refused before any computation.

        Raises:
            MediaError: see `prepare_image`.
        """
        first = frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
        image_tensor = prepare_image(first, size, crf, sampled_size, resize=resize)
        is_single_image = len(frames) == 1 and not isinstance(frames, ClipReader)
        return cls(frames, size, crf, sampled_size, resize, image_tensor if is_single_image else None)

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the frames."""
        return LatentGrid.for_video(self.sampled_size, len(self.frames))

    def chunks(self, chunk_frames: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields chunks of `chunk_frames` frames (the last may be shorter), (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file has changed since it was opened.
        """
        if self.image_tensor is not None:
            yield self.image_tensor.to(device, dtype)
            return
        images = (prepare_image(f, self.size, self.crf, self.sampled_size, resize=self.resize) for f in self.frames)
        for start in range(0, len(self.frames), chunk_frames):
            yield self._stack_chunk(images, min(chunk_frames, len(self.frames) - start)).to(device, dtype)

    def _stack_chunk(self, images: Iterator[Tensor], chunk_frames: int) -> Tensor:
        chunk = torch.empty(1, 3, chunk_frames, self.sampled_size.height, self.sampled_size.width)
        for index, image in enumerate(islice(images, chunk_frames)):
            chunk[:, :, index] = image[:, :, 0]
        return chunk


@dataclass(frozen=True)
class PreparedCondition:
    """A condition prepared for a pass.

    Args:
        pixels: frames for the encoder.
        latent_offset: row and column of its top left latent in the pass's grid, before the crop.
        latent_crop: number of latents to crop at top, bottom, left and right. Latents at an edge inside the video were
            encoded next to grey padding, and would show it.
    """

    resolved_condition: ResolvedCondition
    pixels: PreparedFrames
    latent_offset: tuple[int, int] = (0, 0)
    latent_crop: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the condition, before the crop."""
        return self.pixels.grid


def count_appended_tokens(condition: PreparedCondition) -> int:
    """Returns the number of tokens that a condition appends to the video's; see `apply_condition`."""
    grid = condition.grid
    return (
        0
        if condition.resolved_condition.start_frame == 0
        else min(grid.frames, PREFIX_LATENT_FRAMES) * grid.height * grid.width
    )


def place_in_pass(
    conditions: Sequence[ResolvedCondition], request: Request, resolved_pass: ResolvedPass
) -> list[ResolvedCondition]:
    """Returns the conditions at their frames in one pass, which may sample every second frame.

    Raises:
        RequestError: a box reaches outside the video or is empty after its crop; or the pass samples every second
            frame, and a condition is a clip or two images fall on one frame.
    """
    placed = list(conditions)
    if resolved_pass.fps != request.fps:
        placed = [_at_half_rate(condition) for condition in conditions]
        _refuse_intersections(conditions, placed)
    for condition in placed:
        if condition.condition.box is not None:
            _latent_box(condition.condition.box, request, resolved_pass)
    return placed


def _refuse_intersections(conditions: Sequence[ResolvedCondition], placed: Sequence[ResolvedCondition]) -> None:
    """Refuses conditions that fall on one frame where they are `placed` at half the rate."""
    for first, second in combinations(range(len(placed)), 2):
        if conditions_intersect(placed[first], placed[second]):
            raise RequestError(
                f"two images fall on one frame of the first pass, which samples every second frame only: "
                f"{conditions[first]} and {conditions[second]}. Move one of them, or leave out the temporal "
                "upscaler."
            )


def _at_half_rate(condition: ResolvedCondition) -> ResolvedCondition:
    """Returns the condition at its frame in a pass that samples every second frame."""
    if len(condition.frames) > 1:
        raise RequestError(
            f"{condition.condition.media} is a clip, and the first pass samples every second frame only. Give images, "
            "or leave out the temporal upscaler."
        )
    return replace(condition, start_frame=condition.start_frame // 2)


def prepare_condition(condition: ResolvedCondition, request: Request, resolved_pass: ResolvedPass) -> PreparedCondition:
    """Prepares a condition for the pass that it was placed in.

    Raises:
        MediaError: the image or clip is too small for the size.
    """
    assert isinstance(request.size, Size)
    assert request.image_crf is not None
    if condition.condition.box is None:
        return PreparedCondition(
            condition, PreparedFrames.from_frames(condition.frames, request.size, request.image_crf, resolved_pass.size)
        )
    size, offset, crop = _latent_box(condition.condition.box, request, resolved_pass)
    return PreparedCondition(
        condition, PreparedFrames.from_frames(condition.frames, size, request.image_crf, size), offset, crop
    )


def _latent_box(
    box: Box, request: Request, resolved_pass: ResolvedPass
) -> tuple[Size, tuple[int, int], tuple[int, int, int, int]]:
    """Returns a box in a pass: its size in pixels, and offset and crop as in `PreparedCondition`."""
    assert isinstance(request.size, Size)
    row, column, height, width = _snap_box_to_grid(box, request.size, resolved_pass.grid)
    size = Size(width * SPATIAL_COMPRESSION, height * SPATIAL_COMPRESSION)
    crop = (
        int(row > 0),
        int(row + height < resolved_pass.grid.height),
        int(column > 0),
        int(column + width < resolved_pass.grid.width),
    )
    if height <= crop[0] + crop[1] or width <= crop[2] + crop[3]:
        raise _empty_box_error(box, size, request.size.snap(), resolved_pass)
    return size, (row, column), crop


def _empty_box_error(box: Box, size: Size, sampled_size: Size, resolved_pass: ResolvedPass) -> RequestError:
    grid = resolved_pass.grid
    # Three latents of this pass.
    min_pixels = math.ceil(3 * max(sampled_size.width / grid.width, sampled_size.height / grid.height))
    return RequestError(
        f"box {box} covers {size} pixels of a pass at {resolved_pass.size}: with its margins cut off, nothing is "
        f"left. Give at least {min_pixels} pixels each way, or place it at the edge."
    )


def _snap_box_to_grid(box: Box, size: Size, grid: LatentGrid) -> Box:
    """Returns row, column, height and width in latents, nearest to a box in pixels of a video of `size`."""
    x, y, width, height = box
    if x + width > size.width or y + height > size.height:
        raise RequestError(f"box {box} reaches outside the video, which is {size}.")
    left, _, top, _ = size.padding()
    sampled_size = size.snap()
    columns_per_pixel, rows_per_pixel = grid.width / sampled_size.width, grid.height / sampled_size.height
    column, row = _round_half_up((x + left) * columns_per_pixel), _round_half_up((y + top) * rows_per_pixel)
    right = _round_half_up((x + width + left) * columns_per_pixel)
    bottom = _round_half_up((y + height + top) * rows_per_pixel)
    return row, column, max(bottom - row, 1), max(right - column, 1)


def _round_half_up(position: float) -> int:
    """Rounds halves up. With `round`, the width of a box of three latents would vary with its position."""
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
    """Returns the state with a condition applied: at frame 0 it replaces latents, elsewhere it appends tokens.

    Args:
        latents: normalised latents (1, C, n, h, w) of `condition.pixels`.
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
