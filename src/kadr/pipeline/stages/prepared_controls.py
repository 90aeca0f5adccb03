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
from kadr.pipeline.stages.control_networks import MapRenderer
from kadr.request.inputs import CANNY, Control
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.request.resolved_conditions import Frames
from kadr.request.resolved_controls import ResolvedControl
from kadr.shapes import SPATIAL_COMPRESSION, LatentGrid, Size


@dataclass(frozen=True)
class PreparedControl:
    """A control for one pass, as the encoder is given it: drawn when it is asked for, and not kept.

    Args:
        frame_indices: for each frame, which of the control's it is.
        frames: those.
        requested_size: of the video, as it was asked for.
        reference_size: of the reference.
        map_renderer: draws what a network has found; None where none has looked.
    """

    control: Control
    frame_indices: Sequence[int]
    frames: Frames
    requested_size: Size
    reference_size: Size
    map_renderer: MapRenderer | None = None

    @property
    def grid(self) -> LatentGrid:
        """Of its latents."""
        return LatentGrid.for_video(self.reference_size, len(self.frame_indices))

    def chunks(self, chunk_frames: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """`chunk_frames` pictures at a time, the last ones perhaps fewer: (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file was changed since it was opened.
        """
        pictures = (self.render_frame(*pair) for pair in zip(self.frame_indices, self.frames, strict=True))
        while chunk := list(islice(pictures, chunk_frames)):
            yield torch.stack([normalize_image(one) for one in chunk], dim=1)[None].to(device, dtype)

    def render_frame(self, frame_index: int, frame: str | np.ndarray) -> np.ndarray:
        """What is encoded of one frame, uint8 (H, W, 3)."""
        if self.map_renderer is not None:
            frame = self.map_renderer(frame_index, np.asarray(load_image(frame)))
        covered = fit_to_reference(frame, self.requested_size, self.reference_size, name=self.control.media)
        return canny_edges(covered) if self.control.kind == CANNY else covered


def prepare_control(
    control: ResolvedControl, request: Request, resolved_pass: ResolvedPass, reference_downscale: int = 1
) -> PreparedControl:
    """A control for one pass or window; every second frame of it, where the pass makes only those.

    Args:
        reference_downscale: how many times smaller than the video the references of the LoRA are.

    Raises:
        RequestError: the sides of the pass cannot be divided so.
        MediaError: the medium is too small.
    """
    assert isinstance(request.size, Size)
    unit = SPATIAL_COMPRESSION * reference_downscale
    if resolved_pass.size.width % unit or resolved_pass.size.height % unit:
        raise RequestError(
            f"the references of this LoRA are {reference_downscale} times smaller than the video, and pass {resolved_pass.number} is made "
            f"at {resolved_pass.size}: both sides must be multiples of {unit}. {_suggest_divisible_size(request, resolved_pass, unit)}"
        )
    places = resolved_pass.clip_frame_indices(request.fps, len(control.frames))
    frames = control.frames.select(places) if isinstance(control.frames, ClipReader) else control.frames
    made = Size(resolved_pass.size.width // reference_downscale, resolved_pass.size.height // reference_downscale)
    first = frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
    fit_to_reference(first, request.size, made, name=control.control.media)  # refuses here what is too small
    return PreparedControl(control.control, places, frames, request.size, made)


def _suggest_divisible_size(request: Request, resolved_pass: ResolvedPass, unit: int) -> str:
    """A way out, in words."""
    if request.multi_scale:
        return "Ask for another size, or for a single pass."
    return (
        f"Ask for {Size(*(-(-side // unit) * unit for side in (resolved_pass.size.width, resolved_pass.size.height)))}."
    )
