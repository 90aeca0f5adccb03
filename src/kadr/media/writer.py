"""Writer of output files: frames go to the file as they are made, with the request that made them as metadata.

Frames here are RGB, full range. The ending of the path decides on the format; see `media.encoders.formats`.
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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kadr.cancellation import check_cancelled, remove_if_ended
from kadr.errors import MediaError
from kadr.file_names import is_allowed_name, replace_file
from kadr.media.encoders.animation import GifEncoder, WebPEncoder
from kadr.media.encoders.container import ContainerEncoder
from kadr.media.encoders.encoder import FrameEncoder, Target
from kadr.media.encoders.formats import (
    DEFAULT_ENCODING,
    GIF,
    WEBP,
    Encoding,
    OutputFormat,
    check_pattern,
    check_size,
    find_format,
    frame_path,
    is_pattern,
)
from kadr.media.encoders.images import ImageEncoder
from kadr.media.encoders.paths import with_relative_paths
from kadr.media.encoders.sound import Sound, SoundTrack
from kadr.media.frame_rate import exact_fps
from kadr.media.pyav import check_pyav
from kadr.shapes import Size
from kadr.validation import check_path

PARTIAL_PATTERN = ".kadr-*.part.*"  # names of hidden files, of which a killed process leaves one
COMMENT_KEY = "kadr"  # the comment tag is {"kadr": request}, so that no other program's JSON is taken for a request


class VideoWriter:
    """Writes a video frame by frame; the file appears, or replaces an existing one, once complete.

        with VideoWriter("out.mp4", Size(704, 480), fps=24) as writer:
            for frames in chunks:
                writer.write(frames)

    Until then the frames are in a hidden file beside it, which is removed after any error or interruption. The encoder
    of an mp4 writes a frame only after it has received about 40 more (rate-control lookahead).

    Args:
        path: its ending is one of `FORMATS_BY_SUFFIX`; its folder exists. A name such as frame-%04d.png stands for
            numbered images, from 1.
        size: both sides even in an mp4 or webm, which 4:2:0 colour demands.
        fps: above 0, up to the format's limit; see `exact_fps`.
        encoding: codec, quality, and what else is in the file.
        metadata: the request, as JSON can hold it; `read_metadata` returns it. A function is called when the first
            frame is written, and again at the end: what only became known meanwhile is in the file too.
        sound: is encoded beside the frames, in a format that has sound.
        frames: number of frames that will come, if known.

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
        encoding: Encoding = DEFAULT_ENCODING,
        metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        sound: Sound | None = None,
        frames: int | None = None,
    ) -> None:
        check_path("the path of the video", path)
        check_pyav()
        self.path, self.size = Path(path), size
        self.frames_written = 0
        self.form = _check_target(self.path)
        self.fps = exact_fps(fps, self.form.max_fps)
        codec = encoding.codec_for(self.form)
        check_size(self.form, codec, size)
        self._is_single = self.form.is_image and not is_pattern(self.path)
        if self._is_single and frames is not None and frames > 1:
            self._refuse_frames(frames)
        with_metadata = metadata if encoding.with_metadata else None
        self._metadata = with_metadata if callable(with_metadata) or with_metadata is None else lambda: with_metadata
        self._build_comment()  # raises for what JSON cannot hold
        self._partial = self.path.with_name(_partial_name(self.path))
        crf = None if codec is None else codec.default_crf if encoding.crf is None else encoding.crf
        target = Target(self._partial, self.form, size, self.fps, codec, crf)
        self._encoder = _make_encoder(target, None if sound is None else SoundTrack(sound))
        self._registration = ExitStack()  # of the hidden file, for a process that ends at once

    def __enter__(self) -> VideoWriter:
        self._registration.enter_context(remove_if_ended(self._encoder.close))
        try:
            with self._translate_errors():
                self._encoder.open()
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
        if self._is_single and self.frames_written + len(pixels) > 1:
            self._refuse_frames(self.frames_written + len(pixels))
        with self._translate_errors():
            if not self.frames_written and len(pixels) and (comment := self._build_comment()) is not None:
                self._encoder.set_comment(comment)
            for frame in pixels:
                check_cancelled()
                self._encoder.encode(frame)
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

    def _refuse_frames(self, count: int) -> None:
        numbered = f"{self.path.stem}-%04d{self.path.suffix}"
        raise MediaError(
            f"{self.path} holds one frame, and this video has {count}. Name {numbered} for a file of each "
            "frame, or make a video of 1 frame."
        )

    def _build_comment(self) -> str | None:
        # ASCII, because a prompt may contain what is not valid UTF-8, which another tool could corrupt.
        return None if self._metadata is None else self._dump_metadata(self._metadata())

    def _dump_metadata(self, metadata: Mapping[str, Any]) -> str:
        return json.dumps({COMMENT_KEY: with_relative_paths(metadata, self.path)}, allow_nan=False)

    def _finish(self) -> None:
        if not self.frames_written:
            raise MediaError(f"{self.path} was not written: it got no frames.")
        with self._translate_errors():
            self._encoder.finish(self._build_comment())
            if not isinstance(self._encoder, ImageEncoder):
                _take_name(self._partial, self.path)
                return
            for number in range(1, self.frames_written + 1):
                _take_name(self._encoder.hidden_path(number), frame_path(self.path, number))

    def _discard(self) -> None:
        """Closes and removes the hidden file; after `_finish` it no longer exists, and this does nothing."""
        with suppress(OSError):
            self._encoder.close()
        self._registration.close()

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


def _make_encoder(target: Target, sound: SoundTrack | None) -> FrameEncoder:
    if target.form is GIF:
        return GifEncoder(target)
    if target.form is WEBP:
        return WebPEncoder(target)
    return ImageEncoder(target) if target.form.is_image else ContainerEncoder(target, sound)


def _partial_name(path: Path) -> str:
    """Returns a hidden name that ends as `path` does: programs tell the format by it."""
    return PARTIAL_PATTERN.replace("*", secrets.token_hex(6), 1).replace(".*", path.suffix.lower())


def _take_name(partial: Path, path: Path) -> None:
    """Gives a finished file its name; where that is refused, another one, because the video must not be lost.

    Raises:
        MediaError: names the file that has the video.
    """
    try:
        replace_file(partial, path)
    except PermissionError as error:
        other_path = path.with_stem(f"{path.stem}-{secrets.token_hex(3)}")
        replace_file(partial, other_path)
        raise MediaError(
            f"{path} could not be replaced: {error.strerror or error}; another program may have it open. The video is "
            f"complete, as {other_path}. Rename it once {path.name} is closed."
        ) from error


def _free_space(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f"The folder {folder.absolute()} no longer exists."
    return f"{free} bytes are free in {folder.absolute()}; make room or choose another folder."


def _check_target(path: Path) -> OutputFormat:
    """Returns the format of a file that can be written there."""
    folder = path.parent
    if path.is_dir():
        raise MediaError(f"{path} is a folder. Name a file in it, such as {path / 'out.mp4'}.")
    form = find_format(path)
    if form.is_image:
        check_pattern(path)
    if not is_allowed_name(path.name):
        raise MediaError(f"Windows allows no file named {path.name}. Choose another name, such as out.mp4.")
    if not folder.exists():
        raise MediaError(f"the folder {folder} does not exist. Make it first: mkdir -p {shlex.quote(str(folder))}")
    if not folder.is_dir():
        raise MediaError(f"{folder} is a file, not a folder; {path} cannot be in it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MediaError(f"the folder {folder} may not be written to by this user. Choose another.")
    return form
