"""Images and clips opened for a generation: frames are read and prepared as the VAE encoder takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kadr.errors import MediaError
from kadr.media.clip import ClipReader
from kadr.media.image import Notify
from kadr.media.prepare import prepare_image
from kadr.request.pass_media import PassFrames
from kadr.request.resolved_media import ResolvedMedia
from kadr.shapes import Size

Frames = Sequence["str | np.ndarray"] | ClipReader


class OpenedMedia:
    """The images and clips of a request. A clip is decoded once to find damage before anything is loaded.

    Args:
        media: every use of every file.
        notify: see `load_image`.

    Raises:
        MediaError: a clip cannot be read, or has fewer frames than its header states.
    """

    def __init__(self, media: Sequence[ResolvedMedia], notify: Notify | None = None) -> None:
        self._notify, self._messages = notify, set[str]()
        last_frames: dict[str, int] = {}
        for item in media:
            if item.is_clip:
                last_frames[item.path] = max(last_frames.get(item.path, 0), item.frame_indices[-1])
        self._clips = {path: _open_clip(path, last) for path, last in last_frames.items()}

    def frames(self, media: ResolvedMedia) -> Frames:
        """Returns the frames of one use of a file; those of a clip are decoded when they are iterated over."""
        return self._clips[media.path].select(media.frame_indices) if media.is_clip else [media.path]

    def notify(self, message: str) -> None:
        """Says what kadr changes in an image, once for all uses of it."""
        if self._notify is not None and message not in self._messages:
            self._messages.add(message)
            self._notify(message)


def _open_clip(path: str, last_frame: int) -> ClipReader:
    clip = ClipReader.open(path, last_frame + 1)
    if len(clip) <= last_frame:
        raise MediaError(
            f"{path} is damaged: its header states at least {last_frame + 1} frames, and {len(clip)} can be read. "
            "Convert it again, or use fewer of its frames."
        )
    return clip


@dataclass(frozen=True)
class PreparedFrames:
    """Frames for the VAE encoder, prepared when the encoder reads them, and not kept.

    Args:
        frames: 8k+1 frames.
        size, crf, sampled_size, resize: see `prepare_image`.
        pixels: frames prepared at once, a single image's or those of a caller: float32 (1, 3, F, H, W); None for a
            clip that is read.
    """

    frames: Frames
    size: Size
    crf: int
    sampled_size: Size
    resize: bool = False
    pixels: Tensor | None = None

    @classmethod
    def from_media(cls, pass_frames: PassFrames, crf: int, opened: OpenedMedia) -> PreparedFrames:
        """Wraps frames, and prepares the first one now, so that unusable ones are refused before any computation.

        Raises:
            MediaError: see `prepare_image`.
        """
        frames = opened.frames(pass_frames.media)
        size, sampled_size, resize = pass_frames.size, pass_frames.sampled_size, pass_frames.resize
        image_tensor = prepare_image(first_frame(frames), size, crf, sampled_size, resize=resize, notify=opened.notify)
        is_single_image = not isinstance(frames, ClipReader)
        return cls(frames, size, crf, sampled_size, resize, image_tensor if is_single_image else None)

    @classmethod
    def from_pixels(cls, pass_frames: PassFrames, pixels: Tensor) -> PreparedFrames:
        """Wraps frames (1, 3, 8k+1, H, W) in [-1, 1] that are in memory, at the size that is encoded."""
        names = [pass_frames.media.path] * pixels.shape[2]
        return cls(names, pass_frames.size, 0, pass_frames.sampled_size, pixels=pixels)

    def chunks(self, chunk_frames: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields chunks of `chunk_frames` frames (the last may be shorter), (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file has changed since it was opened.
        """
        if self.pixels is not None:
            yield from (chunk.to(device, dtype) for chunk in self.pixels.split(chunk_frames, dim=2))
            return
        images = (prepare_image(f, self.size, self.crf, self.sampled_size, resize=self.resize) for f in self.frames)
        for start in range(0, len(self.frames), chunk_frames):
            yield self._stack_chunk(images, min(chunk_frames, len(self.frames) - start)).to(device, dtype)

    def _stack_chunk(self, images: Iterator[Tensor], chunk_frames: int) -> Tensor:
        chunk = torch.empty(1, 3, chunk_frames, self.sampled_size.height, self.sampled_size.width)
        for index, image in enumerate(islice(images, chunk_frames)):
            chunk[:, :, index] = image[:, :, 0]
        return chunk


def first_frame(frames: Frames) -> str | np.ndarray:
    """Returns a frame that has the size of all."""
    return frames.sample_frame if isinstance(frames, ClipReader) else frames[0]
