"""Output paths: a file is replaced only if the user named it, and unwritable paths are refused early."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path

from kadr.errors import MediaError, RequestError
from kadr.regular_file import NotRegularFileError, require_regular
from kadr.request.request import Request, refuse_overwriting
from kadr.request.windows import WINDOWS_SUFFIX, window_folder_path
from kadr.shapes import Size

DEFAULT_OUTPUT = "out.mp4"


def choose_output(requested_path: Path | None, *, resume: bool = False) -> Path:
    """Returns the path of the video. Never replaces a file that was not named, or an unfinished video.

    Args:
        resume: resume an interrupted long video.

    Raises:
        RequestError: several videos are unfinished.
    """
    if requested_path is not None and not requested_path.is_dir():
        return requested_path
    return next_free_path(Path(requested_path or "") / DEFAULT_OUTPUT, resume=resume)


def next_free_path(path: Path, *, resume: bool = False) -> Path:
    """Returns the path, or the next free one of clip-2.mp4, clip-3.mp4, ...; to resume, that of the unfinished video.

    Raises:
        RequestError: as `choose_output`.
    """
    if resume:
        return _unfinished_video(path)
    numbered_paths = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return path if _is_free(path) else next(filter(_is_free, numbered_paths))


def _is_free(path: Path) -> bool:
    return not path.exists() and not _has_windows(window_folder_path(path))


def _has_windows(folder: Path) -> bool:
    return any(folder.glob("window-*.safetensors"))


def _unfinished_video(path: Path) -> Path:
    """Returns the unfinished video among the numbered names of `path`; `path` if there is none."""
    numbered = re.compile(rf"{re.escape(path.stem)}(-\d+)?{re.escape(WINDOWS_SUFFIX)}")
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    unfinished = sorted(folder for folder in siblings if numbered.fullmatch(folder.name) and _has_windows(folder))
    if len(unfinished) > 1:
        names = ", ".join(str(folder.with_suffix(path.suffix)) for folder in unfinished)
        raise RequestError(f"several videos are unfinished: {names}. Name the one to resume with --output.")
    return unfinished[0].with_suffix(path.suffix) if unfinished else path


def refuse_missing_media(request: Request) -> None:
    """Refuses images and clips that do not exist or are not regular files, before anything is loaded or fetched.

    Raises:
        MediaError: names them.
    """
    for path in request.media_paths():
        try:
            require_regular(path)
        except NotRegularFileError as error:
            raise MediaError(f"{path} cannot be read: {error}.") from error
        except OSError:
            continue  # named below, with all the others
    absent = [str(path) for path in request.media_paths() if not path.is_file()]
    if absent:
        raise MediaError(f"there is no file {', '.join(absent)}. Check the path of the image or clip.")


def refuse_unwritable(request: Request, output: Path, latents_path: Path | None) -> None:
    """Refuses output files that cannot be written, before anything is loaded or fetched.

    Raises:
        MediaError: a file cannot be written there.
        RequestError: the video would replace a clip it is made from.
    """
    from kadr.media.writer import VideoWriter

    refuse_overwriting(request, output)
    size = request.size if isinstance(request.size, Size) else Size(2, 2)
    VideoWriter(output, size, request.fps or 24)  # refuses a file that it could not write
    if latents_path is not None:
        _refuse_unwritable_latents(latents_path)


def _refuse_unwritable_latents(latents_path: Path) -> None:
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
