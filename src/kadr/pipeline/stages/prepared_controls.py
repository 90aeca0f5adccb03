"""Controls prepared for a pass or window: what the VAE encoder takes."""

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
    """A control prepared for one pass. Control maps are rendered when the encoder reads them, and not kept.

    Args:
        frame_indices: index among the control's frames of each of `frames`.
        frames: frames that the pass uses.
        requested_size: size of the video as requested.
        reference_size: size of the reference that is encoded.
        map_renderer: draws the control map of a frame from a network's estimate; None if no network is needed.
    """

    control: Control
    frame_indices: Sequence[int]
    frames: Frames
    requested_size: Size
    reference_size: Size
    map_renderer: MapRenderer | None = None

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the reference."""
        return LatentGrid.for_video(self.reference_size, len(self.frame_indices))

    def chunks(self, chunk_frames: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields chunks of `chunk_frames` frames (the last may be shorter), (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file has changed since it was opened.
        """
        images = (self.render_frame(*pair) for pair in zip(self.frame_indices, self.frames, strict=True))
        while chunk := list(islice(images, chunk_frames)):
            yield torch.stack([normalize_image(image) for image in chunk], dim=1)[None].to(device, dtype)

    def render_frame(self, frame_index: int, frame: str | np.ndarray) -> np.ndarray:
        """Returns the image that is encoded for one frame, uint8 (H, W, 3)."""
        if self.map_renderer is not None:
            frame = self.map_renderer(frame_index, np.asarray(load_image(frame)))
        fitted = fit_to_reference(frame, self.requested_size, self.reference_size, name=self.control.media)
        return canny_edges(fitted) if self.control.kind == CANNY else fitted


def prepare_control(
    control: ResolvedControl, request: Request, resolved_pass: ResolvedPass, reference_downscale: int = 1
) -> PreparedControl:
    """Prepares a control for one pass or window, with every second frame for a pass at half the frame rate.

    Args:
        reference_downscale: factor by which the LoRA's references are smaller than the video.

    Raises:
        RequestError: the sides of the pass are not divisible by the factor.
        MediaError: the image or clip is too small.
    """
    assert isinstance(request.size, Size)
    unit = SPATIAL_COMPRESSION * reference_downscale
    if resolved_pass.size.width % unit or resolved_pass.size.height % unit:
        raise RequestError(
            f"the references of this LoRA are {reference_downscale} times smaller than the video, and pass "
            f"{resolved_pass.number} is sampled at {resolved_pass.size}: both sides must be multiples of {unit}. "
            f"{_suggest_divisible_size(request, resolved_pass, unit)}"
        )
    frame_indices = resolved_pass.clip_frame_indices(request.fps, len(control.frames))
    frames = control.frames.select(frame_indices) if isinstance(control.frames, ClipReader) else control.frames
    width, height = resolved_pass.size.width, resolved_pass.size.height
    reference_size = Size(width // reference_downscale, height // reference_downscale)
    first = frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
    fit_to_reference(first, request.size, reference_size, name=control.control.media)  # refuses a too small one here
    return PreparedControl(control.control, frame_indices, frames, request.size, reference_size)


def _suggest_divisible_size(request: Request, resolved_pass: ResolvedPass, unit: int) -> str:
    """Suggests in words a size whose sides are multiples of `unit`."""
    if request.multi_scale:
        return "Ask for another size, or for a single pass."
    width, height = (-(-side // unit) * unit for side in (resolved_pass.size.width, resolved_pass.size.height))
    return f"Ask for {Size(width, height)}."
