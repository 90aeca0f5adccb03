"""Video files that are read: into memory, or frame by frame as often as they are asked for.

Frames are RGB, full range, whatever the file holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kadr.errors import MediaError
from kadr.media.writer import COMMENT_KEY, swscale_flags

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# The readers FFmpeg may use. Its playlist readers, left out here, open whatever other files and addresses a file names.
_CONTAINER_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_SEEKABLE = re.compile(
    "mp4|matroska"
)  # containers whose time stamps lead to a frame: those of AVI are counted on the way
_SUPPORTED_CLIPS = "Supported: .mp4, .mov, .mkv, .webm and .avi."


@dataclass(frozen=True)
class Clip:
    """A video in memory.

    Args:
        frames: uint8 (F, H, W, 3): RGB, full range.
        fps: frames per second.
        metadata: the request, if kadr made the file; else empty.
    """

    frames: np.ndarray
    fps: Fraction
    metadata: dict[str, Any] = field(default_factory=dict)


class SeekPoint(NamedTuple):
    """A frame that decoding can begin at: long videos are read window by window, and from the front each time, reading
    would grow with the square of their length.

    Args:
        frame_index: of the frame, from 0.
        pts: its time, in units of the stream's; later than that of every frame before it.
        digest: of its picture. An index may be wrong.
    """

    frame_index: int
    pts: int
    digest: bytes

    @classmethod
    def from_frame(cls, frame_index: int, frame: av.VideoFrame) -> SeekPoint:
        assert frame.pts is not None
        return cls(frame_index, frame.pts, _frame_digest(frame))

    def seek(self, container: InputContainer) -> Iterator[av.VideoFrame] | None:
        """The frames from this one on; None where the file does not lead to it."""
        import av

        try:
            container.seek(self.pts, stream=container.streams.video[0])
            frames = dropwhile(lambda frame: frame.pts is None or frame.pts < self.pts, _decode_frames(container))
            first = next(frames, None)
        except (OSError, av.error.FFmpegError):
            return None
        if first is None or first.pts != self.pts or _frame_digest(first) != self.digest:
            return None
        return chain([first], frames)


def _frame_digest(frame: av.VideoFrame) -> bytes:
    return hashlib.blake2b(bytes(frame.planes[0]), digest_size=8).digest()


@dataclass(frozen=True)
class ClipReader:
    """Frames of a video file, decoded each time they are gone through: none is kept but one.

    Args:
        path: of the file.
        frame_indices: which of its frames, counted from 0. None comes before the one in front of it; one may come again.
        sample_frame: the first frame of the file, uint8 (H, W, 3): what the others are like.
        seek_points: where decoding can begin but at the front, in order.
    """

    path: str | os.PathLike[str]
    frame_indices: Sequence[int]
    sample_frame: np.ndarray = field(repr=False, compare=False)
    seek_points: Sequence[SeekPoint] = field(default=(), repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_frames: int | None = None) -> ClipReader:
        """A video, or its first `max_frames` frames. They are decoded once, so that what is damaged is known from here on.

        Raises:
            MediaError: as `read_video`.
        """
        with _open_video(path) as container:
            sample, count, last, entries = None, 0, None, list[SeekPoint]()
            found = _SEEKABLE.search(container.format.name) is not None
            for frame in islice(_decode_frames(container), max_frames):
                sample = _to_rgb(frame) if sample is None else sample
                if found and count and frame.key_frame and frame.pts is not None and frame.pts > (last or 0):
                    entries.append(SeekPoint.from_frame(count, frame))
                last = max(last or 0, frame.pts or 0)
                count += 1
            if sample is None:
                raise MediaError(f"{path} holds no frames.")
            _frame_rate(path, container)
        return cls(path, range(count), sample, entries)

    def __len__(self) -> int:
        return len(self.frame_indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each uint8 (H, W, 3): RGB, full range, upright.

        Raises:
            MediaError: the file was changed since it was opened.
        """
        first = self.frame_indices[0] if self.frame_indices else 0
        if (entry := next((one for one in reversed(self.seek_points) if one.frame_index <= first), None)) is not None:
            with _open_video(self.path) as container:
                if (frames := entry.seek(container)) is not None:
                    yield from self._select_from(frames, entry.frame_index - 1)
                    return
        with _open_video(self.path) as container:
            yield from self._select_from(_decode_frames(container), -1)

    def _select_from(self, frames: Iterator[av.VideoFrame], previous_index: int) -> Iterator[np.ndarray]:
        """The picks among frames. at: the number of the frame before them."""
        picture = self.sample_frame
        for pick in self.frame_indices:
            if previous_index < pick:
                frame = next(islice(frames, pick - previous_index - 1, None), None)
                if frame is None:
                    raise MediaError(
                        f"{self.path} has fewer frames than when it was opened. Leave it as it is until the video is "
                        "made."
                    )
                previous_index, picture = pick, _to_rgb(frame)
            yield picture

    def select(self, indices: Iterable[int]) -> ClipReader:
        """Those at some places among these, which must not fall: `film.chosen([0, 2, 2])` is three frames."""
        return ClipReader(
            self.path, [self.frame_indices[place] for place in indices], self.sample_frame, self.seek_points
        )


def read_video(path: str | os.PathLike[str], max_frames: int | None = None) -> Clip:
    """Read a video, or its first `max_frames` frames, into memory.

    The colour tags of the file are honoured, and so is the rotation that phones note down instead of turning pixels.

    Raises:
        MediaError: it is missing, not a video, damaged before the frames wanted, or does not tell its frame rate.
    """
    with _open_video(path) as container:
        frames = [_to_rgb(frame) for frame in islice(_decode_frames(container), max_frames)]
        if not frames:
            raise MediaError(f"{path} holds no frames.")
        return Clip(np.stack(frames), _frame_rate(path, container), _find_request(container.metadata) or {})


def probe_video(path: str | os.PathLike[str]) -> tuple[int, Fraction]:
    """How many frames a video has, and how many per second. No frame is decoded.

    They are counted: the number in a header is also of those that an edit list leaves out, as phones and cuts without
    encoding make one.

    Raises:
        MediaError: it is missing, not a video, or does not tell its frame rate.
    """
    with _open_video(path) as container:
        stream = container.streams.video[0]
        frames = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        if not frames:
            raise MediaError(f"{path} holds no frames.")
        return frames, _frame_rate(path, container)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Find the request that made a video. No frame is decoded.

    Raises:
        MediaError: the file is missing, not a video, or holds no request of kadr.
    """
    with _open_video(path) as container:
        request = _find_request(container.metadata)
    if request is None:
        raise MediaError(
            f"{path} holds no request of kadr: another program made it, or re-encoded it and dropped the comment tag."
        )
    return request


def _frame_rate(path: str | os.PathLike[str], container: InputContainer) -> Fraction:
    stream = container.streams.video[0]
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise MediaError(f"{path} does not tell its frame rate. Convert it to an mp4 of constant frame rate.")
    return Fraction(fps)


def _decode_frames(container: InputContainer) -> Iterator[av.VideoFrame]:
    # In PyAV's default of threads within a frame: with whole frames in flight, FFmpeg ends a damaged file early and in
    # silence.
    yield from container.decode(container.streams.video[0])


@contextmanager
def _open_video(path: str | os.PathLike[str]) -> Iterator[InputContainer]:
    """Open for reading; what goes wrong in the block is explained as well."""
    import av

    if not Path(path).is_file():
        raise MediaError(f"{path}: there is no such file.")
    try:
        # An absolute path, because FFmpeg takes "name:..." for an address.
        name, options = str(Path(path).absolute()), {"format_whitelist": _CONTAINER_FORMATS}
        # Tags need not be UTF-8: other programs write what they like, and damage does.
        with av.open(name, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{path} holds no video. {_SUPPORTED_CLIPS}")
            yield container
    except (OSError, av.error.FFmpegError) as error:
        raise MediaError(f"{path} cannot be read as a video: {error.strerror or error}. {_SUPPORTED_CLIPS}") from error


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3), upright."""
    picture = frame.reformat(format="rgb24", interpolation=swscale_flags()).to_ndarray()
    return np.rot90(picture, k=round(frame.rotation / 90))


def _find_request(tags: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        request = json.loads(tags.get("comment", ""))[COMMENT_KEY]
    except (ValueError, TypeError, LookupError):
        return None
    return request if isinstance(request, dict) else None
