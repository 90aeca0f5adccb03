"""Images and clips of a request as their headers describe them: path, size, and the frames that are used.

No pixel is read here: `pipeline.stages.media` opens them when a generation begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kadr.errors import RequestError
from kadr.media.clip import ClipHeader, probe_video
from kadr.media.image import probe_image

FrameRange = tuple[int | None, int | None]  # (first, end), as a Python slice


@dataclass(frozen=True)
class ResolvedMedia:
    """An image or clip that exists, known from its header.

    Args:
        width, height: of a frame, in pixels: of an image upright, of a clip as stored.
        frame_indices: the frames that are used, counted from 0, in non-decreasing order; (0,) for an image.
    """

    path: str
    width: int
    height: int
    frame_indices: tuple[int, ...] = (0,)
    is_clip: bool = False

    @classmethod
    def from_image(cls, path: str) -> ResolvedMedia:
        """Reads the header of an image.

        Raises:
            MediaError: it cannot be read.
        """
        return cls(path, *probe_image(path))

    @classmethod
    def from_clip(
        cls, path: str, frame_range: FrameRange | None = None, *, max_frames: int | None = None
    ) -> tuple[ResolvedMedia, ClipHeader]:
        """Reads the headers of a clip; returns the frames of its range, which may be empty, and the header.

        Args:
            max_frames: number of frames from the first on that are needed; None: all.

        Raises:
            MediaError: it cannot be read, or was cut off before the last frame that is needed.
        """
        header = probe_video(path)
        header.refuse_cut_off(path, max_frames)
        first, end = frame_range or (None, None)
        indices = tuple(range(header.frames)[first:end])
        return cls(path, header.width, header.height, indices, is_clip=True), header

    def __len__(self) -> int:
        return len(self.frame_indices)

    def select(self, indices: Iterable[int]) -> ResolvedMedia:
        """Returns some of these frames, by non-decreasing index: `select([0, 2, 2])` is three frames."""
        return replace(self, frame_indices=tuple(self.frame_indices[index] for index in indices))


def resolve_condition_clip(path: str, frame_range: FrameRange | None) -> ResolvedMedia:
    """Returns the frames of a condition's clip.

    Raises:
        MediaError: the clip cannot be read.
        RequestError: the range is empty.
    """
    clip, header = ResolvedMedia.from_clip(path, frame_range)
    if not len(clip):
        first, end = ("" if value is None else value for value in frame_range or (None, None))
        raise RequestError(f"the range {first}:{end} of {path} is empty; the clip has {header.frames} frames.")
    return clip


def resolve_input_video(path: str, frames: int, sampled_frames: int) -> ResolvedMedia:
    """Returns the 8k+1 frames of an input video that a request needs; if it is shorter, its last frame is repeated.

    Frames past the requested ones share a latent frame with those, so they are read too, as in the official script.

    Args:
        frames, sampled_frames: of the video, as requested and as sampled.

    Raises:
        MediaError: it cannot be read.
        RequestError: it is shorter than the requested video.
    """
    clip, header = ResolvedMedia.from_clip(path, max_frames=frames)
    if header.frames < frames:
        raise RequestError(
            f"{path} has {header.frames} frames, fewer than the {frames} of the video. Ask for {header.frames} or "
            "fewer."
        )
    readable = frames if header.is_cut_off else header.frames  # what follows a cut is not worth refusing the file
    return clip.select(min(frame, readable - 1) for frame in range(sampled_frames))
