"""Readers of video files: into memory, or frame by frame, as often as needed.

Frames are RGB, full range, whatever the file uses.
"""

from __future__ import annotations

import hashlib
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

from kadr.cancellation import check_cancelled
from kadr.errors import MediaError
from kadr.json_reader import parse_json
from kadr.media.encoders.container import swscale_flags
from kadr.media.encoders.paths import with_absolute_paths
from kadr.media.encoders.tags import TAGGED_SUFFIXES, read_comment
from kadr.media.known_headers import find_known_header
from kadr.media.pyav import check_pyav
from kadr.media.writer import COMMENT_KEY
from kadr.regular_file import require_regular

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

# The demuxers FFmpeg may use. Its playlist demuxers, left out here, open whatever files and addresses a file names.
_CONTAINER_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_SEEKABLE = re.compile("mp4|matroska")  # containers in which a timestamp leads to a frame; AVI only counts frames
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
    """A frame that decoding can begin at.

    Long videos are read window by window; decoding from the front for each window would take time that grows with the
    square of the video's length.

    Args:
        frame_index: of the frame, from 0.
        pts: its presentation timestamp, in the stream's time base; later than that of every frame before it.
        digest: hash of its pixels, because a file's index may be wrong.
    """

    frame_index: int
    pts: int
    digest: bytes

    @classmethod
    def from_frame(cls, frame_index: int, frame: av.VideoFrame) -> SeekPoint:
        assert frame.pts is not None
        return cls(frame_index, frame.pts, _frame_digest(frame))

    def seek(self, container: InputContainer) -> Iterator[av.VideoFrame] | None:
        """Returns the frames from this one on; None if seeking does not lead to it."""
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
    """Frames of a video file, decoded again on every iteration; only one is in memory at a time.

    Args:
        path: of the file.
        frame_indices: the frames to read, counted from 0, in non-decreasing order; a frame may be repeated.
        sample_frame: the first frame of the file, uint8 (H, W, 3), for the size of all.
        seek_points: frames other than the first that decoding can begin at, in order.
    """

    path: str | os.PathLike[str]
    frame_indices: Sequence[int]
    sample_frame: np.ndarray = field(repr=False, compare=False)
    seek_points: Sequence[SeekPoint] = field(default=(), repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_frames: int | None = None) -> ClipReader:
        """Opens a video, or its first `max_frames` frames. They are decoded once, to find damage at once.

        Raises:
            MediaError: as `read_video`.
        """
        with _open_video(path) as container:
            sample_frame, count, last_pts, seek_points = None, 0, None, list[SeekPoint]()
            is_seekable = _SEEKABLE.search(container.format.name) is not None
            for frame in islice(_decode_frames(container), max_frames):
                sample_frame = _to_rgb(frame) if sample_frame is None else sample_frame
                if is_seekable and count and _is_later_key_frame(frame, last_pts or 0):
                    seek_points.append(SeekPoint.from_frame(count, frame))
                last_pts = max(last_pts or 0, frame.pts or 0)
                count += 1
            if sample_frame is None:
                raise MediaError(f"{path} contains no frames.")
            _frame_rate(path, container)
        return cls(path, range(count), sample_frame, seek_points)

    def __len__(self) -> int:
        return len(self.frame_indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields each frame as uint8 (H, W, 3): RGB, full range, upright.

        Raises:
            MediaError: the file was changed since it was opened.
        """
        first = self.frame_indices[0] if self.frame_indices else 0
        start = next((point for point in reversed(self.seek_points) if point.frame_index <= first), None)
        if start is not None:
            with _open_video(self.path) as container:
                if (frames := start.seek(container)) is not None:
                    yield from self._select_from(frames, start.frame_index - 1)
                    return
        with _open_video(self.path) as container:
            yield from self._select_from(_decode_frames(container), -1)

    def _select_from(self, frames: Iterator[av.VideoFrame], previous_index: int) -> Iterator[np.ndarray]:
        """Yields the selected ones of decoded frames.

        Args:
            previous_index: of the frame before the first of `frames`.
        """
        pixels = self.sample_frame
        for index in self.frame_indices:
            if previous_index < index:
                frame = next(islice(frames, index - previous_index - 1, None), None)
                if frame is None:
                    raise MediaError(
                        f"{self.path} has fewer frames than when it was opened. Do not change it until the video is "
                        "made."
                    )
                previous_index, pixels = index, _to_rgb(frame)
            yield pixels

    def select(self, indices: Iterable[int]) -> ClipReader:
        """Returns a reader of some of these frames, by non-decreasing index: `select([0, 2, 2])` is three frames."""
        return ClipReader(
            self.path, [self.frame_indices[index] for index in indices], self.sample_frame, self.seek_points
        )


def read_video(path: str | os.PathLike[str], max_frames: int | None = None) -> Clip:
    """Reads a video, or its first `max_frames` frames, into memory.

    The colour tags of the file are honoured, and so is the rotation that phones store instead of rotating pixels.

    Raises:
        MediaError: the file is missing, not a video, damaged before the last wanted frame, or has no frame rate.
    """
    with _open_video(path) as container:
        frames = [_to_rgb(frame) for frame in islice(_decode_frames(container), max_frames)]
        if not frames:
            raise MediaError(f"{path} contains no frames.")
        return Clip(np.stack(frames), _frame_rate(path, container), _find_request(container.metadata) or {})


def read_frame(path: str | os.PathLike[str], index: int, *, or_last: bool = False) -> np.ndarray:
    """Returns one frame of a video, uint8 (H, W, 3): RGB, full range, upright. The frames before it are decoded too.

    Args:
        index: from 0; a negative one counts from the end.
        or_last: the last frame stands for those beyond it.

    Raises:
        MediaError: as `ClipReader.open`; or there is no such frame.
    """
    reader = ClipReader.open(path, None if index < 0 else index + 1)
    count = len(reader)
    if or_last:
        index = min(index, count - 1)
    if not -count <= index < count:
        raise MediaError(f"{path} has {count} frames, and none is frame {index}. Give {-count} to {count - 1}.")
    return next(iter(reader.select([index % count])))


class ClipHeader(NamedTuple):
    """A video as its headers describe it.

    Args:
        frames: number of frames; of a file that was cut off, of those that are whole.
        width, height: as stored, before any rotation.
        is_cut_off: the file ends within a frame.
    """

    frames: int
    fps: Fraction
    width: int
    height: int
    is_cut_off: bool

    def refuse_cut_off(self, path: str | os.PathLike[str], frames: int | None = None) -> None:
        """Refuses a file that was cut off before the last of `frames` frames; None means all of them.

        Raises:
            MediaError: it was.
        """
        if self.is_cut_off and (frames is None or self.frames < frames):
            raise MediaError(
                f"{path} is damaged: it ends within frame {self.frames + 1}. Copy or download it again, or use only "
                f"its first {self.frames} frames."
            )


def probe_video(path: str | os.PathLike[str]) -> ClipHeader:
    """Returns what a video's headers state. No frame is decoded.

    Packets are counted: the number in a header includes frames that an edit list leaves out, as phones and lossless
    cutters write one.

    Raises:
        MediaError: the file is missing, not a video, or has no frame rate.
    """
    if (known := find_known_header(path)) is not None:
        if known.frames is None or known.fps is None:
            raise MediaError(f"{path} is an image, not a video.")
        return ClipHeader(known.frames, known.fps, known.width, known.height, known.is_cut_off)
    with _open_video(path) as container:
        stream = container.streams.video[0]
        frames, is_cut_off = 0, False
        for packet in container.demux(stream):
            check_cancelled()
            is_cut_off |= packet.is_corrupt
            frames += bool(packet.size) and not packet.is_discard and not packet.is_corrupt
        if not frames and not is_cut_off:
            raise MediaError(f"{path} contains no frames.")
        return ClipHeader(frames, _frame_rate(path, container), stream.width, stream.height, is_cut_off)


def probe_upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns the width and height of a video as it is shown. Decodes one frame, the only place that says how it lies.

    Raises:
        MediaError: the file is missing, not a video, or has no frame that can be read.
    """
    if (known := find_known_header(path)) is not None:
        return known.upright_width, known.upright_height
    with _open_video(path) as container:
        frame = next(_decode_frames(container), None)
        if frame is None:
            raise MediaError(f"{path} contains no frames.")
        is_on_its_side = round(frame.rotation / 90) % 2
        return (frame.height, frame.width) if is_on_its_side else (frame.width, frame.height)


def read_metadata(path: str | os.PathLike[str], *, absolute_paths: bool = True) -> dict[str, Any]:
    """Returns the metadata that kadr stored in a video or an image, of any schema number. No frame is decoded.

    `kadr.schema.upgrade_video_metadata` upgrades it.

    Args:
        absolute_paths: make paths absolute that are stored relative to the file; False returns them as stored.

    Raises:
        MediaError: the file is missing, not a video, or contains no request of kadr.
    """
    if Path(path).suffix.lower() in TAGGED_SUFFIXES:
        require_regular(path)
        request = _find_request({"comment": read_comment(Path(path)) or ""})
    else:
        with _open_video(path) as container:
            request = _find_request(container.metadata)
    if request is None:
        raise MediaError(
            f"{path} contains no request of kadr: it was made with --no-metadata or by another program, or "
            "re-encoded without the comment tag."
        )
    return with_absolute_paths(request, Path(path)) if absolute_paths else request


def _frame_rate(path: str | os.PathLike[str], container: InputContainer) -> Fraction:
    stream = container.streams.video[0]
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise MediaError(f"{path} does not state its frame rate. Convert it to an mp4 of constant frame rate.")
    return Fraction(fps)


def _decode_frames(container: InputContainer) -> Iterator[av.VideoFrame]:
    # PyAV's default, threads within a frame: with threads across frames FFmpeg silently ends a damaged file early.
    for frame in container.decode(container.streams.video[0]):
        check_cancelled()
        yield frame


@contextmanager
def _open_video(path: str | os.PathLike[str]) -> Iterator[InputContainer]:
    """Opens a video for reading; errors in the block become MediaErrors too."""
    check_pyav()
    import av

    try:
        require_regular(path)
        # An absolute path, because FFmpeg takes "name:..." for an address.
        name, options = str(Path(path).absolute()), {"format_whitelist": _CONTAINER_FORMATS}
        # Tags may not be UTF-8: other programs write any bytes, and files get damaged.
        with av.open(name, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{path} contains no video. {_SUPPORTED_CLIPS}")
            yield container
    except FileNotFoundError:
        raise MediaError(f"{path}: there is no such file.") from None
    except (OSError, av.error.FFmpegError) as error:
        raise MediaError(f"{path} cannot be read as a video: {error.strerror or error}. {_SUPPORTED_CLIPS}") from error


def _is_later_key_frame(frame: av.VideoFrame, last_pts: int) -> bool:
    return bool(frame.key_frame) and frame.pts is not None and frame.pts > last_pts


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Returns uint8 (H, W, 3), upright."""
    pixels = frame.reformat(format="rgb24", interpolation=swscale_flags()).to_ndarray()
    return np.rot90(pixels, k=round(frame.rotation / 90))


def _find_request(tags: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        request = parse_json(tags.get("comment") or tags.get("COMMENT", ""))[COMMENT_KEY]  # the latter in Matroska
    except (ValueError, TypeError, LookupError):
        return None
    return request if isinstance(request, dict) else None
