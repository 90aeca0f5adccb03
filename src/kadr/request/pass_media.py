"""Media of each pass or window: where conditions lie in its latent grid, and which frames of clips it takes.

Placement follows LTXVideoPipeline.prepare_conditioning of the official package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations

from kadr.errors import MediaError, RequestError
from kadr.media.image import check_crop
from kadr.request.inputs import Control
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_conditions import Box, ResolvedCondition, conditions_intersect
from kadr.request.resolved_controls import ResolvedControl
from kadr.request.resolved_media import ResolvedMedia
from kadr.request.windows import Span
from kadr.sampling.conditioning import PREFIX_LATENT_FRAMES
from kadr.shapes import SPATIAL_COMPRESSION, LatentGrid, Size


@dataclass(frozen=True)
class PassFrames:
    """Frames that the VAE encoder takes for a pass.

    Args:
        media: the frames.
        size: size whose aspect they are cropped to.
        sampled_size: size that they are encoded at.
        resize: see `media.prepare.prepare_image`.
    """

    media: ResolvedMedia
    size: Size
    sampled_size: Size
    resize: bool = False

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the frames."""
        return LatentGrid.for_video(self.sampled_size, len(self.media))


@dataclass(frozen=True)
class PassCondition:
    """A condition at its frame in a pass or window.

    Args:
        frames: what is encoded.
        latent_offset: row and column of its top left latent in the pass's grid, before the crop.
        latent_crop: number of latents to crop at top, bottom, left and right. Latents at an edge inside the video were
            encoded next to grey padding, and would show it.
    """

    resolved_condition: ResolvedCondition
    frames: PassFrames
    latent_offset: tuple[int, int] = (0, 0)
    latent_crop: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the condition, before the crop."""
        return self.frames.grid

    @property
    def num_appended_tokens(self) -> int:
        """Number of tokens that it appends to the video's; one at frame 0 replaces latents instead."""
        if self.resolved_condition.start_frame == 0:
            return 0
        return min(self.grid.frames, PREFIX_LATENT_FRAMES) * self.grid.height * self.grid.width

    @property
    def is_anchor_image(self) -> bool:
        """True for a whole image at frame 0, which can anchor every window of a long video."""
        resolved = self.resolved_condition
        return resolved.start_frame == 0 and len(resolved.media) == 1 and resolved.condition.box is None


@dataclass(frozen=True)
class PassControl:
    """A control in a pass or window.

    Args:
        media: the frames that the pass uses.
        frame_indices: index among the control's frames of each of them.
        size: size of the video as requested.
        reference_size: size of the reference that is encoded.
    """

    control: Control
    media: ResolvedMedia
    frame_indices: tuple[int, ...]
    size: Size
    reference_size: Size

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the reference."""
        return LatentGrid.for_video(self.reference_size, len(self.frame_indices))


@dataclass(frozen=True)
class PassMedia:
    """Images and clips of one pass or window.

    Args:
        conditions: at their positions in the pass or window.
        input_video: video to start from; None if there is none.
    """

    conditions: tuple[PassCondition, ...] = ()
    input_video: PassFrames | None = None
    controls: tuple[PassControl, ...] = ()


def pass_conditions(
    conditions: Sequence[ResolvedCondition], size: Size, fps: float, resolved_pass: ResolvedPass
) -> tuple[PassCondition, ...]:
    """Returns the conditions at their frames in one pass, which may sample every second frame.

    Args:
        size, fps: of the video, as requested.

    Raises:
        RequestError: a box reaches outside the video or is empty after its crop; or the pass samples every second
            frame, and a condition is a clip or two images fall on one frame.
        MediaError: an image is too small.
    """
    placed = list(conditions)
    if resolved_pass.fps != fps:
        placed = [_at_half_rate(condition) for condition in conditions]
        _refuse_intersections(conditions, placed)
    return tuple(_place(condition, size, resolved_pass) for condition in placed)


def _place(condition: ResolvedCondition, size: Size, resolved_pass: ResolvedPass) -> PassCondition:
    if condition.condition.box is None:
        _refuse_too_small(condition.media, size)
        return PassCondition(condition, PassFrames(condition.media, size, resolved_pass.size))
    box_size, offset, crop = _latent_box(condition.condition.box, size, resolved_pass)
    _refuse_too_small(condition.media, box_size)
    return PassCondition(condition, PassFrames(condition.media, box_size, box_size), offset, crop)


def _refuse_too_small(media: ResolvedMedia, size: Size) -> None:
    """Refuses media that are too small; a clip, whose frames may be rotated, if it is so either way.

    Raises:
        MediaError: less than 2x2 pixels would be left of it.
    """
    try:
        check_crop(media.width, media.height, size, name=media.path)
    except MediaError:
        if not media.is_clip:
            raise
        with suppress(MediaError):
            check_crop(media.height, media.width, size, name=media.path)
            return
        raise


def window_conditions(conditions: Sequence[PassCondition], span: Span) -> tuple[PassCondition, ...]:
    """Returns the conditions that lie wholly inside a window, at their frames in it.

    The first latent of a later window is dropped, because its frame 0 belongs to the end of the window before.
    """
    inside = (item for item in conditions if _lies_inside(item.resolved_condition, span))
    return tuple(
        replace(
            item,
            resolved_condition=replace(
                item.resolved_condition, start_frame=item.resolved_condition.start_frame - span.first_frame
            ),
        )
        for item in inside
    )


def check_inside_windows(conditions: Sequence[ResolvedCondition], spans: Sequence[Span]) -> None:
    """Refuses clips that cross the end of a window.

    Raises:
        RequestError: a clip does not lie inside one window; names the windows.
    """
    for condition in conditions:
        if not any(_lies_inside(condition, span) for span in spans):
            ranges = ", ".join(
                f"{span.first_frame + bool(span.start)} to {span.first_frame + span.frames - 1}" for span in spans[:4]
            )
            raise RequestError(
                f"{condition} does not lie inside one window; the windows cover frames {ranges}"
                f"{' and so on' if len(spans) > 4 else ''}. Move it, use fewer of its frames (PATH#A:B), or give a "
                "longer --window."
            )


def _lies_inside(condition: ResolvedCondition, span: Span) -> bool:
    start = condition.start_frame - span.first_frame
    min_start = 1 if span.start else 0
    return min_start <= start and start + len(condition.media) <= span.frames


def pass_input_video(
    input_video: ResolvedMedia | None, size: Size, fps: float, resolved_pass: ResolvedPass
) -> PassFrames | None:
    """Returns the input video for a pass or window, with every second frame for a pass at half the frame rate."""
    if input_video is None or resolved_pass.number > 1:
        return None
    frames = input_video.select(resolved_pass.clip_frame_indices(fps, len(input_video)))
    return PassFrames(frames, size, resolved_pass.size, resize=True)


def pass_control(
    control: ResolvedControl, size: Size, fps: float, resolved_pass: ResolvedPass, reference_downscale: int
) -> PassControl:
    """Returns a control in one pass or window, with every second frame for a pass at half the frame rate.

    Args:
        reference_downscale: factor by which the LoRA's references are smaller than the video.

    Raises:
        RequestError: the sides of the pass are not divisible by the factor.
    """
    _refuse_too_small(control.media, size)
    unit = SPATIAL_COMPRESSION * reference_downscale
    if resolved_pass.size.width % unit or resolved_pass.size.height % unit:
        raise RequestError(
            f"the references of this LoRA are {reference_downscale} times smaller than the video, and pass "
            f"{resolved_pass.number} is sampled at {resolved_pass.size}: both sides must be multiples of {unit}. "
            f"{_suggest_divisible_size(resolved_pass, size.snap(), unit)}"
        )
    indices = tuple(resolved_pass.clip_frame_indices(fps, len(control.media)))
    media = control.media.select(indices) if control.media.is_clip else control.media
    width, height = resolved_pass.size.width, resolved_pass.size.height
    reference_size = Size(width // reference_downscale, height // reference_downscale)
    return PassControl(control.control, media, indices, size, reference_size)


def _suggest_divisible_size(resolved_pass: ResolvedPass, sampled_size: Size, unit: int) -> str:
    """Suggests in words a size whose sides are multiples of `unit`."""
    if resolved_pass.number > 1 or resolved_pass.size != sampled_size:
        return "Ask for another size, or for a single pass (--single-pass)."
    width, height = (-(-side // unit) * unit for side in (resolved_pass.size.width, resolved_pass.size.height))
    return f"Ask for {Size(width, height)}."


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
    if len(condition.media) > 1:
        raise RequestError(
            f"{condition.condition.media} is a clip, and the first pass samples every second frame only. Give images, "
            "or leave out the temporal upscaler."
        )
    return replace(condition, start_frame=condition.start_frame // 2)


def _latent_box(
    box: Box, requested_size: Size, resolved_pass: ResolvedPass
) -> tuple[Size, tuple[int, int], tuple[int, int, int, int]]:
    """Returns a box in a pass: its size in pixels, and offset and crop as in `PassCondition`."""
    row, column, height, width = _snap_box_to_grid(box, requested_size, resolved_pass.grid)
    size = Size(width * SPATIAL_COMPRESSION, height * SPATIAL_COMPRESSION)
    crop = (
        int(row > 0),
        int(row + height < resolved_pass.grid.height),
        int(column > 0),
        int(column + width < resolved_pass.grid.width),
    )
    if height <= crop[0] + crop[1] or width <= crop[2] + crop[3]:
        raise _empty_box_error(box, size, requested_size.snap(), resolved_pass)
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
