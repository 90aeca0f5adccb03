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
from kadr.request.passes import PassPlan
from kadr.request.request import Request
from kadr.request.resolved_conditions import Box, Frames, Placed, meet
from kadr.sampling.conditioning import PREFIX_LATENT_FRAMES, append_keyframe, insert_clip, replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid, Size


@dataclass(frozen=True)
class Pixels:
    """Pictures as the encoder is given them: prepared when they are asked for, and not kept.

    Args:
        frames: 8k+1 of them.
        size, crf, made, resize: see `prepare_image`.
        only: what a single picture comes to, float32 (1, 3, 1, H, W); it is prepared at once.
    """

    frames: Frames
    size: Size
    crf: int
    made: Size
    resize: bool = False
    only: Tensor | None = None

    @classmethod
    def of(cls, frames: Frames, size: Size, crf: int, made: Size, *, resize: bool = False) -> Pixels:
        """The first one is prepared here, so that what cannot be is known before anything is computed.

        Raises:
            MediaError: see `prepare_image`.
        """
        first = frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
        made_of_it = prepare_image(first, size, crf, made, resize=resize)
        single = len(frames) == 1 and not isinstance(frames, ClipReader)
        return cls(frames, size, crf, made, resize, made_of_it if single else None)

    @property
    def grid(self) -> LatentGrid:
        """Of their latents."""
        return LatentGrid.for_video(self.made, len(self.frames))

    def chunks(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """`count` pictures at a time, the last ones perhaps fewer: (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file was changed since it was opened.
        """
        if self.only is not None:
            yield self.only.to(device, dtype)
            return
        prepared = (prepare_image(f, self.size, self.crf, self.made, resize=self.resize) for f in self.frames)
        for start in range(0, len(self.frames), count):
            yield self._joined(prepared, min(count, len(self.frames) - start)).to(device, dtype)

    def _joined(self, prepared: Iterator[Tensor], count: int) -> Tensor:
        chunk = torch.empty(1, 3, count, self.made.height, self.made.width)
        for place, picture in enumerate(islice(prepared, count)):
            chunk[:, :, place] = picture[:, :, 0]
        return chunk


@dataclass(frozen=True)
class Fitted:
    """A condition at the size of a pass.

    Args:
        pixels: what the encoder is given of it.
        corner: row and column of the latent grid at which it lies, before its margins are cut.
        cut: latents that are cut off: top, bottom, left and right. Those at an edge that is not the video's have seen
            its grey outside, and look like it.
    """

    placed: Placed
    pixels: Pixels
    corner: tuple[int, int] = (0, 0)
    cut: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def grid(self) -> LatentGrid:
        """Of its latents."""
        return self.pixels.grid


def added(item: Fitted) -> int:
    """How many tokens of its own a condition has behind the video's; see `put`."""
    grid = item.grid
    return 0 if item.placed.start == 0 else min(grid.frames, PREFIX_LATENT_FRAMES) * grid.height * grid.width


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
            if meet(made[one], made[other]):
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
    """The condition for one pass, in which it is settled.

    Raises:
        MediaError: it is too small for the size.
    """
    assert isinstance(request.size, Size)
    assert request.image_crf is not None
    if placed.condition.box is None:
        return Fitted(placed, Pixels.of(placed.frames, request.size, request.image_crf, plan.size))
    size, corner, cut = _spot(placed.condition.box, request, plan)
    return Fitted(placed, Pixels.of(placed.frames, size, request.image_crf, size), corner, cut)


def _spot(box: Box, request: Request, plan: PassPlan) -> tuple[Size, tuple[int, int], tuple[int, int, int, int]]:
    """What a box becomes in a pass: its size in pixels, and its corner and what is cut of it as in `Fitted`."""
    assert isinstance(request.size, Size)
    row, column, height, width = _on_grid(box, request.size, plan.grid)
    size = Size(width * SPATIAL_COMPRESSION, height * SPATIAL_COMPRESSION)
    cut = (
        int(row > 0),
        int(row + height < plan.grid.height),
        int(column > 0),
        int(column + width < plan.grid.width),
    )
    if height <= cut[0] + cut[1] or width <= cut[2] + cut[3]:
        made = request.size.snap()
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
    left, _, top, _ = size.padding()
    made = size.snap()
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
        return replace_latents(state, inner, strength, origin=(0, row + top, column + left))
    own = latents[:, :, :PREFIX_LATENT_FRAMES]
    grid = LatentGrid(*own.shape[2:])
    where = token_positions(grid, fps=plan.fps, causal=causal, first_frame=start)
    if latents.shape[2] == 1:
        return append_keyframe(state, latents, where, strength, draw(own.shape))
    return insert_clip(state, latents, where, strength, draw(own.shape), latent_frame=start // TEMPORAL_COMPRESSION)
