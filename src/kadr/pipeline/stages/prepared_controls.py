"""Controls at the size of a pass or window, as the VAE's encoder is given them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.media.clip import ClipReader
from kadr.media.control_maps import canny_edges, fit_to_reference, normalize_image
from kadr.media.image import load_image
from kadr.pipeline.stages.control_networks import Drawn
from kadr.request.inputs import CANNY, Control
from kadr.request.passes import PassPlan
from kadr.request.request import Request
from kadr.request.resolved_conditions import Frames
from kadr.request.resolved_controls import Followed
from kadr.shapes import SPATIAL_COMPRESSION, LatentGrid, Size


@dataclass(frozen=True)
class Reference:
    """A control for one pass, as the encoder is given it: drawn when it is asked for, and not kept.

    Args:
        places: for each frame, which of the control's it is.
        frames: those.
        size: of the video, as it was asked for.
        made: of the reference.
        drawn: draws what a network has found; None where none has looked.
    """

    control: Control
    places: Sequence[int]
    frames: Frames
    size: Size
    made: Size
    drawn: Drawn | None = None

    @property
    def grid(self) -> LatentGrid:
        """Of its latents."""
        return LatentGrid.for_video(self.made, len(self.places))

    def chunks(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """`count` pictures at a time, the last ones perhaps fewer: (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file was changed since it was opened.
        """
        pictures = (self.picture(*pair) for pair in zip(self.places, self.frames, strict=True))
        while chunk := list(islice(pictures, count)):
            yield torch.stack([normalize_image(one) for one in chunk], dim=1)[None].to(device, dtype)

    def picture(self, place: int, frame: str | np.ndarray) -> np.ndarray:
        """What is encoded of one frame, uint8 (H, W, 3)."""
        if self.drawn is not None:
            frame = self.drawn(place, np.asarray(load_image(frame)))
        covered = fit_to_reference(frame, self.size, self.made, name=self.control.media)
        return canny_edges(covered) if self.control.kind == CANNY else covered


def reference(followed: Followed, request: Request, plan: PassPlan, downscale: int = 1) -> Reference:
    """A control for one pass or window; every second frame of it, where the pass makes only those.

    Args:
        downscale: how many times smaller than the video the references of the LoRA are.

    Raises:
        RequestError: the sides of the pass cannot be divided so.
        MediaError: the medium is too small.
    """
    assert isinstance(request.size, Size)
    unit = SPATIAL_COMPRESSION * downscale
    if plan.size.width % unit or plan.size.height % unit:
        raise RequestError(
            f"the references of this LoRA are {downscale} times smaller than the video, and pass {plan.number} is made "
            f"at {plan.size}: both sides must be multiples of {unit}. {_divisible(request, plan, unit)}"
        )
    places = plan.seen(request.fps, len(followed.frames))
    frames = followed.frames.select(places) if isinstance(followed.frames, ClipReader) else followed.frames
    made = Size(plan.size.width // downscale, plan.size.height // downscale)
    first = frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
    fit_to_reference(first, request.size, made, name=followed.control.media)  # refuses here what is too small
    return Reference(followed.control, places, frames, request.size, made)


def _divisible(request: Request, plan: PassPlan, unit: int) -> str:
    """A way out, in words."""
    if request.multi_scale:
        return "Ask for another size, or for a single pass."
    return f"Ask for {Size(*(-(-side // unit) * unit for side in (plan.size.width, plan.size.height)))}."
