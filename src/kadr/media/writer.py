"""Writer of video files: frames go to mp4 as they are decoded, with the request that made them as metadata.

Frames here are RGB, full range; files use BT.709, limited range, and say so, which is what players assume for mp4.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from kadr.cancellation import check_cancelled, remove_if_ended
from kadr.errors import MediaError
from kadr.file_names import is_allowed_name, replace_file
from kadr.media.pyav import check_pyav
from kadr.quoting import quote
from kadr.shapes import Size
from kadr.validation import check_path, is_whole_number

if TYPE_CHECKING:
    import av

DEFAULT_CRF = 18  # visually lossless for most eyes
MAX_CRF = 51  # of 8-bit H.264
MAX_FILE_FPS = 1000

PARTIAL_PATTERN = ".kadr-*.part.mp4"  # names of hidden files, of which a killed process leaves one

COMMENT_KEY = "kadr"  # the comment tag is {"kadr": request}, so that no other program's JSON is taken for a request
_BT709 = 1  # the same number in FFmpeg's enums of matrices, primaries and transfer curves
_LIMITED_RANGE, _FULL_RANGE = 1, 2


class VideoWriter:
    """Writes an mp4 (H.264, 4:2:0) frame by frame; the file appears, or replaces an existing one, once complete.

        with VideoWriter("out.mp4", Size(704, 480), fps=24) as writer:
            for frames in chunks:
                writer.write(frames)

    Until then the frames are in a hidden file beside it, which is removed after any error or interruption. The encoder
    writes a frame only after it has received about 40 more (rate-control lookahead).

    Args:
        path: ends in .mp4; its folder exists.
        size: both sides even, which 4:2:0 colour demands.
        fps: above 0, up to 1000. Whole numbers and ratios over at most 1001 are kept exactly; 23.976 is 2997/125.
        crf: 0 (lossless) to 51.
        metadata: the request, as JSON can hold it; `read_metadata` returns it. A function is called when the first
            frame is written, and again at the end: what only became known meanwhile is in the file too.

    Raises:
        MediaError: at construction, for every argument that cannot work; inside the `with` block, if frames have
            another shape or dtype, no frame was written, or the disk is full.
        Cancelled: the work is cancelled; looked at before each frame.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: Size,
        fps: float | Fraction,
        *,
        crf: int = DEFAULT_CRF,
        metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        check_path("the path of the video", path)
        check_pyav()
        self.path, self.size, self.fps = Path(path), size, _exact_fps(fps)
        self.crf = crf
        self.frames_written = 0
        _check_target(self.path)
        check_even_sides(size)
        if not is_whole_number(crf) or not 0 <= crf <= MAX_CRF:
            raise MediaError(f"crf is {crf}; it must lie between 0 (lossless) and {MAX_CRF}.")
        self._metadata = metadata if callable(metadata) or metadata is None else lambda: metadata
        self._comment = self._build_comment()
        self._partial = self.path.with_name(_partial_name())
        self._registration = ExitStack()  # of the hidden file, for a process that ends at once

    def __enter__(self) -> VideoWriter:
        self._registration.enter_context(remove_if_ended(self._remove_partial))
        try:
            with self._translate_errors():
                self._open()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, frames: ArrayLike) -> None:
        """Appends frames, uint8 (F, height, width, 3): RGB, full range, on the CPU. F may be any number, also 0."""
        pixels = np.ascontiguousarray(frames)
        height, width = self.size.height, self.size.width
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (height, width, 3):
            raise MediaError(
                f"frames are {pixels.dtype} {pixels.shape}; this file takes uint8 (F, {height}, {width}, 3)."
            )
        with self._translate_errors():
            if not self.frames_written and len(pixels):
                self._set_comment()
            for frame in pixels:
                check_cancelled()
                self._container.mux(self._stream.encode(self._convert(frame)))
                self.frames_written += 1

    def write_all(self, chunks: Iterable[ArrayLike]) -> None:
        """Writes each chunk of frames in a thread, while the next one is made. At most one is being written."""
        with ThreadPoolExecutor(1, "video encoder") as thread:
            writing: Future[None] | None = None
            for frames in chunks:
                if writing is not None:
                    writing.result()
                writing = thread.submit(copy_context().run, self.write, frames)
            if writing is not None:
                writing.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _open(self) -> None:
        import av

        self._container = av.open(str(self._partial.absolute()), "w", format="mp4", options=self._container_options())
        options = {"crf": str(self.crf), **_repeatable_options()}
        self._stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        self._stream.width, self._stream.height = self.size.width, self.size.height
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE

    def _build_comment(self) -> str | None:
        # ASCII, because a prompt may contain what is not valid UTF-8, which another tool could corrupt.
        return None if self._metadata is None else json.dumps({COMMENT_KEY: dict(self._metadata())}, allow_nan=False)

    def _set_comment(self) -> None:
        """Sets the comment tag; the container writes its header with the first packet."""
        self._comment = self._build_comment()
        if self._comment is not None:
            self._container.metadata["comment"] = self._comment

    def _convert(self, pixels: np.ndarray) -> av.VideoFrame:
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=_BT709,
            src_color_range=_FULL_RANGE,
            dst_color_range=_LIMITED_RANGE,
            interpolation=swscale_flags(),
        )
        frame.pts, frame.time_base = self.frames_written, 1 / self.fps
        return frame

    def _finish(self) -> None:
        if not self.frames_written:
            raise MediaError(f"{self.path} was not written: it got no frames.")
        with self._translate_errors():
            for packet in self._stream.codec_context.encode_lazy():  # the frames of the lookahead
                check_cancelled()
                packet.stream = self._stream
                self._container.mux(packet)
            self._container.close()
            if (comment := self._build_comment()) is not None and comment != self._comment:
                self._replace_comment(comment)
            _take_name(self._partial, self.path)

    def _replace_comment(self, comment: str) -> None:
        """Copies the finished file with another comment tag; no frame is encoded again."""
        import av

        copy = self._partial.with_name(_partial_name())
        try:
            with (
                av.open(str(self._partial.absolute())) as source,
                av.open(str(copy.absolute()), "w", format="mp4", options=self._container_options()) as target,
            ):
                target.metadata["comment"] = comment
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
            replace_file(copy, self._partial)
        finally:
            copy.unlink(missing_ok=True)

    def _container_options(self) -> dict[str, str]:
        # By default mp4 counts a file's duration in 1/1000 s, which no frame rate over 1001 divides, and buffers 32 KiB
        # of frames.
        return {"movflags": "+faststart", "movie_timescale": str(self.fps.numerator), "flush_packets": "1"}

    def _discard(self) -> None:
        """Closes and removes the hidden file; after `_finish` it no longer exists, and this does nothing."""
        if hasattr(self, "_container"):
            with suppress(Exception):  # closing writes the index, which fails again where the disk is full
                self._container.close()
        with suppress(OSError):
            self._remove_partial()
        self._registration.close()

    def _remove_partial(self) -> None:
        self._partial.unlink(missing_ok=True)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        import av

        try:
            yield
        except OSError as error:  # PyAV's errors are also OSErrors where the system gave the number
            reason = f"{self.path} could not be written: {error.strerror or error}."
            raise MediaError(f"{reason} {_free_space(self.path.parent)}") from error
        except av.error.FFmpegError as error:
            raise MediaError(f"{self.path} could not be encoded: {error}.") from error


def _repeatable_options() -> dict[str, str]:
    """Returns options of x264 with which the same frames give the same file.

    With AVX-512, the rate control of x264 (its macroblock tree) gives other bits each time: of the 8 files made of the
    same 25 frames at 704x480, 7 differed. Its AVX2 code is as fast there, and repeats itself.
    """
    import torch  # loaded already by whoever has frames to write

    return {"x264-params": "asm=avx2"} if torch.cpu._is_avx512_supported() else {}


def _partial_name() -> str:
    return PARTIAL_PATTERN.replace("*", secrets.token_hex(6))


def _take_name(partial: Path, path: Path) -> None:
    """Gives a finished file its name; where that is refused, another one, because the video must not be lost.

    Raises:
        MediaError: names the file that has the video.
    """
    try:
        replace_file(partial, path)
    except PermissionError as error:
        other_path = path.with_stem(f"{path.stem}-{partial.name.split('.')[1]}")
        replace_file(partial, other_path)
        raise MediaError(
            f"{path} could not be replaced: {error.strerror or error}; another program may have it open. The video is "
            f"complete, as {other_path}. Rename it once {path.name} is closed."
        ) from error


def swscale_flags() -> int:
    """Returns flags for resampling colour. FFmpeg's default repeats samples: five times the mean error on a ramp."""
    from av.video.reformatter import Interpolation

    full_chroma = Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    return Interpolation.BILINEAR | Interpolation.ACCURATE_RND | full_chroma


def _free_space(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f"The folder {folder.absolute()} no longer exists."
    return f"{free} bytes are free in {folder.absolute()}; make room or choose another folder."


def _exact_fps(fps: float | Fraction) -> Fraction:
    try:
        rate = Fraction(0 if isinstance(fps, bool) else fps).limit_denominator(1001)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not 0 < rate <= MAX_FILE_FPS:
        raise MediaError(f"fps is {fps}; it must be a number above 0 and at most {MAX_FILE_FPS}, such as 24 or 29.97.")
    return rate


def check_even_sides(size: Size) -> None:
    """Raises: MediaError: a video of this size cannot be written."""
    if size.width % 2 or size.height % 2:
        below = Size(max(2, size.width // 2 * 2), max(2, size.height // 2 * 2))
        above = Size(-(-size.width // 2) * 2, -(-size.height // 2) * 2)
        nearest = " or ".join(dict.fromkeys((str(below), str(above))))
        raise MediaError(f"size is {size}; an mp4 of this kind needs even sides. The nearest: {nearest}.")


def _check_target(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise MediaError(f"{path} is a folder. Name a file in it, such as {path / 'out.mp4'}.")
    if path.suffix.lower() != ".mp4":
        raise MediaError(
            f"{path} ends in {quote(path.suffix or 'nothing')}; only .mp4 can be written. Name it {path.stem}.mp4."
        )
    if not is_allowed_name(path.name):
        raise MediaError(f"Windows allows no file named {path.name}. Choose another name, such as out.mp4.")
    if not folder.exists():
        raise MediaError(f"the folder {folder} does not exist. Make it first: mkdir -p {shlex.quote(str(folder))}")
    if not folder.is_dir():
        raise MediaError(f"{folder} is a file, not a folder; {path} cannot be in it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MediaError(f"the folder {folder} may not be written to by this user. Choose another.")
