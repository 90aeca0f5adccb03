"""Controls prepared for a pass or window: what the VAE encoder takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kadr.media.control_maps import canny_edges, fit_to_reference, normalize_image
from kadr.media.image import load_image
from kadr.pipeline.stages.control_networks import MapRenderer
from kadr.pipeline.stages.prepared_frames import Frames, OpenedMedia, first_frame
from kadr.request.inputs import CANNY
from kadr.request.pass_media import PassControl


@dataclass(frozen=True)
class PreparedControl:
    """A control prepared for one pass. Control maps are rendered when the encoder reads them, and not kept.

    Args:
        frames: frames that the pass uses.
        map_renderer: draws the control map of a frame from a network's estimate; None if no network is needed.
    """

    control: PassControl
    frames: Frames
    map_renderer: MapRenderer | None = None

    @classmethod
    def from_media(cls, control: PassControl, opened: OpenedMedia) -> PreparedControl:
        """Wraps frames, and refuses unusable ones before any computation.

        Raises:
            MediaError: the image or clip is too small.
        """
        frames = opened.frames(control.media)
        name, notify = control.control.media, opened.notify
        fit_to_reference(first_frame(frames), control.size, control.reference_size, name=name, notify=notify)
        return cls(control, frames)

    def chunks(self, chunk_frames: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields chunks of `chunk_frames` frames (the last may be shorter), (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file has changed since it was opened.
        """
        images = (self.render_frame(*pair) for pair in zip(self.control.frame_indices, self.frames, strict=True))
        while chunk := list(islice(images, chunk_frames)):
            yield torch.stack([normalize_image(image) for image in chunk], dim=1)[None].to(device, dtype)

    def render_frame(self, frame_index: int, frame: str | np.ndarray) -> np.ndarray:
        """Returns the image that is encoded for one frame, uint8 (H, W, 3)."""
        if self.map_renderer is not None:
            frame = self.map_renderer(frame_index, np.asarray(load_image(frame)))
        control = self.control
        fitted = fit_to_reference(frame, control.size, control.reference_size, name=control.control.media)
        return canny_edges(fitted) if control.control.kind == CANNY else fitted
