"""The request's pictures and clips: read, checked against each other, fitted to a pass, and put into its state.

Placement follows LTXVideoPipeline.prepare_conditioning of the official package. A clip is cut to 8k+1 frames as its
trim_conditioning_sequence does, with a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from kadr.errors import KadrWarning, RequestError
from kadr.media.clip import read_length, read_video
from kadr.media.image import load_picture, prepare_picture
from kadr.pipeline.passes import PassPlan
from kadr.pipeline.request import Condition, Request
from kadr.sampling.conditions import PREFIX, append, hold, join
from kadr.sampling.positions import positions
from kadr.sampling.state import LatentState
from kadr.shapes import SPATIAL, TEMPORAL, LatentGrid, Size, snap_frames

Frames = Sequence["str | np.ndarray"]
Box = tuple[int, int, int, int]  # x, y, width and height


@dataclass(frozen=True)
class Placed:
    """A condition whose media has been read.

    Args:
        frames: the pictures; 8k+1 of them.
        start: pixel frame of the video at which they begin, 0 or later.
    """

    condition: Condition
    frames: Frames
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.frames)

    def __str__(self) -> str:
        what = f"frame {self.start}" if len(self.frames) == 1 else f"frames {self.start} to {self.end - 1}"
        return f"{self.condition.media} ({what})"


def read_conditions(request: Request) -> list[Placed]:
    """Read all conditions of a request whose size and frames are known, and check that each has its place.

    Raises:
        MediaError: a file cannot be read.
        RequestError: a condition lies past the end, begins where it cannot, or lies over another.
    """
    assert request.frames is not None
    placed = [_read(condition, request.frames) for condition in request.conditions]
    for one, other in combinations(placed, 2):
        if _meet(one, other):
            raise RequestError(f"two conditions lie over each other: {one} and {other}. Leave one out, or move it.")
    return placed


def _read(condition: Condition, frames: int) -> Placed:
    """The condition in a video of `frames` frames, made at the next 8k+1 up."""
    if condition.clip:
        return _clip(condition, frames)
    start = condition.frame if condition.frame >= 0 else frames + condition.frame
    if not 0 <= start < frames:
        raise _past_the_ends(condition, frames)
    load_picture(condition.media)  # refuses here what is no picture; later it is read by its path, which errors name
    return Placed(condition, [condition.media], start)


def _clip(condition: Condition, frames: int) -> Placed:
    made, by_end = snap_frames(frames), condition.frame < 0
    at = made + condition.frame if by_end else condition.frame  # where it ends, or begins
    if not 0 <= at < (made if by_end else frames):
        raise _past_the_ends(condition, frames)
    pictures = _whole_groups(condition, _part(condition), at + 1 if by_end else made - at)
    start = at + 1 - len(pictures) if by_end else at
    if start >= frames:
        raise _past_the_ends(condition, frames)
    if start % TEMPORAL and len(pictures) > 1:
        below = start // TEMPORAL * TEMPORAL
        raise RequestError(
            f"{condition.media} is to begin at frame {start}; a clip begins at a multiple of {TEMPORAL}: "
            f"{below} or {below + TEMPORAL}."
        )
    if by_end and at >= frames:
        _warn(
            f"{condition.media} ends at frame {at}, and the video after {frames} frames, so its last {at + 1 - frames} "
            f"are not shown. Ask for {made} frames."
        )
    return Placed(condition, list(pictures), start)


def _past_the_ends(condition: Condition, frames: int) -> RequestError:
    return RequestError(
        f"{condition.media} is to stand at frame {condition.frame}, past the ends of a video of {frames} frames. "
        f"Give 0 to {frames - 1}, or more frames."
    )


def _part(condition: Condition) -> np.ndarray:
    first, end = condition.part or (None, None)
    # Only what is wanted is decoded, where that can be told from the front.
    limit = max(end, 1) if end is not None and end >= 0 and (first is None or first >= 0) else None
    chosen = read_video(condition.media, limit).frames[first:end]
    if not len(chosen):
        count, _ = read_length(condition.media)
        raise RequestError(f"the part {_told(first, end)} of {condition.media} is empty; the clip has {count} frames.")
    return chosen


def _told(first: int | None, end: int | None) -> str:
    return f"{'' if first is None else first}:{'' if end is None else end}"


def _whole_groups(condition: Condition, pictures: np.ndarray, room: int) -> np.ndarray:
    """As many frames as fit, 8k+1: the first ones, or the last where the clip is placed by its end."""
    count = min(len(pictures), room)
    kept = (count - 1) // TEMPORAL * TEMPORAL + 1
    if kept < len(pictures):
        which = "last" if condition.frame < 0 else "first"
        _warn(
            f"{condition.media} has {len(pictures)} frames for {room}; clips are used in 8k+1, so its {which} {kept} "
            "are."
        )
    return pictures[-kept:] if condition.frame < 0 else pictures[:kept]


def _warn(message: str) -> None:
    warnings.warn(message, KadrWarning, stacklevel=2)


def _meet(one: Placed, other: Placed) -> bool:
    """Whether there is a frame, and a pixel of it, that both cover."""
    if one.end <= other.start or other.end <= one.start:
        return False
    if one.condition.box is None or other.condition.box is None:
        return True
    (x, y, width, height), (u, v, across, down) = one.condition.box, other.condition.box
    return x < u + across and u < x + width and y < v + down and v < y + height


def read_start(request: Request) -> Frames:
    """The frames of the video that a request starts from, 8k+1 of them: the last is repeated to fill them up.

    Raises:
        MediaError: it cannot be read.
        RequestError: it is shorter than what is to be made.
    """
    assert request.video is not None
    assert request.frames is not None
    frames = read_video(request.video, request.frames).frames
    if len(frames) < request.frames:
        raise RequestError(
            f"{request.video} has {len(frames)} frames, and {request.frames} are to be made from it. "
            f"Ask for {len(frames)} or fewer."
        )
    missing = snap_frames(request.frames) - len(frames)
    return [*frames, *([frames[-1]] * missing)]


def pixels_of(frames: Frames, size: Size, crf: int, made: Size, *, resize: bool = False) -> Tensor:
    """What the encoder is given: float32 (1, 3, n, H, W) in [-1, 1] at `made`; see `prepare_picture`."""
    return torch.cat([prepare_picture(frame, size, crf, made, resize=resize) for frame in frames], dim=2)


@dataclass(frozen=True)
class Fitted:
    """A condition at the size of a pass.

    Args:
        pixels: float32 (1, 3, n, H, W) in [-1, 1].
        corner: row and column of the latent grid at which it lies, before its margins are cut.
        cut: latents that are cut off: top, bottom, left and right. Those at an edge that is not the video's have seen
            its grey outside, and look like it.
    """

    placed: Placed
    pixels: Tensor
    corner: tuple[int, int] = (0, 0)
    cut: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def grid(self) -> LatentGrid:
        """Of its latents."""
        frames, height, width = self.pixels.shape[2:]
        return LatentGrid((frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL)


def added(item: Fitted) -> int:
    """How many tokens of its own a condition has behind the video's; see `put`."""
    grid = item.grid
    return 0 if item.placed.start == 0 else min(grid.frames, PREFIX) * grid.height * grid.width


def settled(placed: Sequence[Placed], request: Request, plan: PassPlan) -> list[Placed]:
    """The conditions where they stand in one pass.

    Raises:
        RequestError: a box does not lie inside the video, or nothing would be left of it; or the pass makes every
            second frame, and there is a clip, whose frames do not fall on its own, or two pictures fall on one of them.
    """
    made = list(placed)
    if plan.fps != request.fps:
        made = [_slowed(item) for item in placed]
        for one, other in combinations(range(len(made)), 2):
            if _meet(made[one], made[other]):
                raise RequestError(
                    f"two pictures fall on one frame of the first pass, which makes every second frame only: "
                    f"{placed[one]} and {placed[other]}. Move one of them, or leave out the temporal upscaler."
                )
    for item in made:
        if item.condition.box is not None:
            _spot(item.condition.box, request, plan)
    return made


def _slowed(placed: Placed) -> Placed:
    """The condition in a pass that makes every second frame."""
    if len(placed.frames) > 1:
        raise RequestError(
            f"{placed.condition.media} is a clip, and the first pass makes every second frame only. Give pictures, or "
            "leave out the temporal upscaler."
        )
    return replace(placed, start=placed.start // 2)


def fitted(placed: Placed, request: Request, plan: PassPlan) -> Fitted:
    """The condition for one pass, in which it is settled."""
    assert isinstance(request.size, Size)
    assert request.image_crf is not None
    if placed.condition.box is None:
        return Fitted(placed, pixels_of(placed.frames, request.size, request.image_crf, plan.size))
    size, corner, cut = _spot(placed.condition.box, request, plan)
    return Fitted(placed, pixels_of(placed.frames, size, request.image_crf, size), corner, cut)


def _spot(box: Box, request: Request, plan: PassPlan) -> tuple[Size, tuple[int, int], tuple[int, int, int, int]]:
    """What a box becomes in a pass: its size in pixels, and its corner and what is cut of it as in `Fitted`."""
    assert isinstance(request.size, Size)
    row, column, height, width = _on_grid(box, request.size, plan.grid)
    size = Size(width * SPATIAL, height * SPATIAL)
    cut = (
        int(row > 0),
        int(row + height < plan.grid.height),
        int(column > 0),
        int(column + width < plan.grid.width),
    )
    if height <= cut[0] + cut[1] or width <= cut[2] + cut[3]:
        made = request.size.snapped()
        least = math.ceil(3 * max(made.width / plan.grid.width, made.height / plan.grid.height))  # latents of this pass
        raise RequestError(
            f"box {box} covers {size} pixels of a pass at {plan.size}: with its margins cut off, nothing is left. "
            f"Give at least {least} pixels each way, or place it at the edge."
        )
    return size, (row, column), cut


def _on_grid(box: Box, size: Size, grid: LatentGrid) -> Box:
    """Row, column, height and width in latents, the nearest to a box in pixels of a video of `size`."""
    x, y, width, height = box
    if x + width > size.width or y + height > size.height:
        raise RequestError(f"box {box} reaches outside the video, which is {size}.")
    left, _, top, _ = size.margins()
    made = size.snapped()
    across, down = grid.width / made.width, grid.height / made.height
    column, row = _nearest((x + left) * across), _nearest((y + top) * down)
    right, bottom = _nearest((x + width + left) * across), _nearest((y + height + top) * down)
    return row, column, max(bottom - row, 1), max(right - column, 1)


def _nearest(position: float) -> int:
    """Halves go up, always: as `round` has them, a box of three would be two or four wide, by where it stands."""
    return math.floor(position + 0.5)


def put(
    state: LatentState,
    item: Fitted,
    latents: Tensor,
    plan: PassPlan,
    *,
    causal: bool,
    draw: Callable[[torch.Size], Tensor],
) -> LatentState:
    """The state with a condition in it.

    Args:
        latents: (1, C, n, h, w), normalised, of `item.pixels`.
        draw: noise for latents that become tokens of their own.
    """
    strength, start = item.placed.condition.strength, item.placed.start
    if start == 0:
        top, bottom, left, right = item.cut
        row, column = item.corner
        inner = latents[..., top : latents.shape[-2] - bottom, left : latents.shape[-1] - right]
        return hold(state, inner, strength, at=(0, row + top, column + left))
    own = latents[:, :, :PREFIX]
    grid = LatentGrid(*own.shape[2:])
    where = positions(grid, fps=plan.fps, causal=causal, first_frame=start)
    if latents.shape[2] == 1:
        return append(state, latents, where, strength, draw(own.shape))
    return join(state, latents, where, strength, draw(own.shape), frame=start // TEMPORAL)
