"""Output paths: only a named file is replaced, names are reserved, and unwritable paths are refused early."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path

from kadr.cli.reservation import Reservation, release_at_end, reserve_file
from kadr.errors import MediaError, RequestError
from kadr.media.encoders.formats import DEFAULT_ENCODING, Encoding, frame_path, is_pattern
from kadr.request.request import Request, refuse_overwriting
from kadr.request.windows import WINDOWS_SUFFIX, window_folder_path
from kadr.shapes import Size
from kadr.validation import check_path

DEFAULT_OUTPUT = "out.mp4"
ANY_SIZE = Size(256, 256)  # that every format can hold


@contextmanager
def reserve_output(
    request: Request,
    requested_path: Path | None,
    *,
    beside: Path | None = None,
    latents_path: Path | None = None,
    resume: bool = False,
    encoding: Encoding = DEFAULT_ENCODING,
) -> Iterator[Path]:
    """Chooses the path of the video, and reserves it and that of the latents while the block runs.

    Never replaces a file that was not named, an unfinished video, or what another process writes.

    Args:
        requested_path: a file, or a folder for a new file; None for a new file.
        encoding: as for `Engine.write`.
        beside: gives a new file its folder and name, such as clip-2.mp4 for clip.mp4; by default out.mp4.
        resume: resume an interrupted long video.

    Raises:
        RequestError: several videos are unfinished, another process writes the file, or the video would replace a clip
            it is made from.
        MediaError: a file cannot be written there.
    """
    with ExitStack() as reservations:
        if requested_path is not None and not requested_path.is_dir():
            path = requested_path
            _refuse_unwritable(request, path, latents_path, encoding)
            reservations.enter_context(reserve_file(path, flag="--output"))
        else:
            first_path = (beside or Path(DEFAULT_OUTPUT)) if requested_path is None else requested_path / DEFAULT_OUTPUT
            unfinished = _unfinished_video(first_path) if resume else None
            reservation = _reserve_new(first_path) if unfinished is None else unfinished
            reservations.enter_context(release_at_end(reservation))
            path = reservation.path
            _refuse_unwritable(request, path, latents_path, encoding)
        if latents_path is not None:
            reservations.enter_context(reserve_file(latents_path, flag="--save-latents"))
        yield path


def _reserve_new(path: Path) -> Reservation:
    """Reserves the path, or the next free one of clip-2.mp4, clip-3.mp4, ..."""
    numbered_paths = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    for candidate in filter(is_free, chain([path], numbered_paths)):
        reservation = Reservation(candidate)
        if not reservation.acquire():
            continue
        if is_free(candidate):  # the process that had reserved it may have written it just now
            return reservation
        reservation.release()
    raise AssertionError("there is always another number")


def is_free(path: Path) -> bool:
    """Returns whether no video of that name exists, finished or not."""
    file = frame_path(path, 1) if is_pattern(path) else path
    return not file.exists() and not _has_windows(window_folder_path(path))


def _has_windows(folder: Path) -> bool:
    return any(folder.glob("window-*.safetensors"))


def _unfinished_video(path: Path) -> Reservation | None:
    """Reserves the unfinished video among the numbered names of `path`; returns None if there is none.

    Videos that other processes are making are not unfinished.
    """
    numbered = re.compile(rf"{re.escape(path.stem)}(-\d+)?{re.escape(WINDOWS_SUFFIX)}")
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = sorted(folder for folder in siblings if numbered.fullmatch(folder.name) and _has_windows(folder))
    reservations = [Reservation(folder.with_suffix(path.suffix)) for folder in folders]
    acquired = [reservation for reservation in reservations if reservation.acquire()]
    if len(acquired) > 1:
        for reservation in acquired:
            reservation.release()
        names = ", ".join(str(reservation.path) for reservation in acquired)
        raise RequestError(f"several videos are unfinished: {names}. Name the one to resume with --output.")
    if reservations and not acquired:
        names = ", ".join(str(reservation.path) for reservation in reservations)
        raise RequestError(f"another process is writing {names}. Wait until it ends, or leave out --resume.")
    return acquired[0] if acquired else None


def _refuse_unwritable(request: Request, output: Path, latents_path: Path | None, encoding: Encoding) -> None:
    """Refuses output files that cannot be written, before anything is loaded or fetched.

    Raises:
        MediaError: a file cannot be written there.
        RequestError: the video would replace a clip it is made from.
    """
    refuse_overwriting(request, output)
    refuse_unwritable_video(request, output, encoding)
    if latents_path is not None:
        refuse_unwritable_latents(latents_path)


def refuse_unwritable_video(request: Request, output: Path, encoding: Encoding) -> None:
    """Refuses a file that cannot be written.

    Raises:
        MediaError: it cannot be written there.
        RequestError: the name is too long for the folder of its windows.
    """
    from kadr.media.writer import VideoWriter  # loads numpy

    if request.windows is not None:
        check_path("the folder of finished windows", window_folder_path(output))
    size = request.size if isinstance(request.size, Size) else ANY_SIZE
    # Refuses a file that it could not write.
    VideoWriter(output, size, request.fps or 24, encoding=encoding, frames=request.frames)


def refuse_unwritable_latents(latents_path: Path) -> None:
    """Refuses a .safetensors that cannot be written; errors as for `refuse_unwritable_video`."""
    folder = latents_path.parent
    if latents_path.is_dir():
        raise MediaError(
            f"{latents_path} is a folder. Name a file in it, such as {latents_path / 'latents.safetensors'}."
        )
    if latents_path.suffix != ".safetensors":
        raise MediaError(f"{latents_path} does not end in .safetensors. Name it {latents_path.stem}.safetensors.")
    if not folder.is_dir():
        raise MediaError(f"the folder {folder} does not exist. Make it first, or choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MediaError(f"the folder {folder} may not be written to by this user. Choose another.")
