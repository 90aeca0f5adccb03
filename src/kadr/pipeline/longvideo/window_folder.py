"""Finished windows on disk, beside the video they belong to: `clip.windows` until `clip.mp4` is written.

Each window is a file that gets its name when it is complete, so any interruption leaves only finished windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.atomic_write import atomic_path
from kadr.cancellation import remove_if_ended
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import read_tensors
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.json_reader import parse_json
from kadr.pipeline.longvideo.folder_lock import lock_folder, remove_lock
from kadr.quoting import quote
from kadr.regular_file import read_text
from kadr.schema import WINDOW_FOLDER, upgrade_video_metadata

REQUEST_FILE = "request.json"
EXECUTION_KEY = "execution"  # weight format, backend and threads of the transformer: others round differently
_WINDOW_FILE_NAME, _LATENTS, _DIGEST_KEY = re.compile(r"window-(\d{4,})\.safetensors"), "latents", "sha256"
_VIDEO_KEY = "video"  # in the request file, beside the schema number: the identity
_KERNELS_KEY = "kernels"  # beside it: the kernels that were chosen by timing. Others are no other video
_MAX_DIFFERENCES = 3  # differences that an error names


def finished_windows(folder: Path) -> list[int]:
    """Returns the indices, from 0, of the windows in a folder."""
    # Unlike `Path.is_dir`, no error where the name is too long for a folder: a video without windows needs none.
    files = [file for file in folder.iterdir() if file.is_file()] if os.path.isdir(folder) else []
    matches = (_WINDOW_FILE_NAME.fullmatch(file.name) for file in files)
    return sorted(int(match[1]) - 1 for match in matches if match is not None)


def stored_prompt(folder: Path, prompt: str) -> tuple[str, str | None] | None:
    """Returns the stored prompt, and the prompt it was enhanced from if it was; None if the user's prompt differs.

    Raises:
        CheckpointError, MediaError, RequestError: as `_read_identity`.
    """
    if not os.path.isfile(folder / REQUEST_FILE):
        return None
    try:
        request = _read_identity(folder)["request"]
        stored, original = request["prompt"], request["original_prompt"]
    except (LookupError, TypeError):
        return None  # `WindowFolder.open` names what is wrong with the folder
    return (stored, original) if prompt == (stored if original is None else original) else None


def check_resumable(folder: Path, *, resume: bool) -> None:
    """Refuses to start over finished windows, and to resume windows whose request is unknown.

    Raises:
        RequestError: names the ways out.
    """
    windows, has_request = finished_windows(folder), os.path.isfile(folder / REQUEST_FILE)
    if windows and not has_request:
        raise RequestError(
            f"{folder} holds {_count_windows(windows)}, but no {REQUEST_FILE} that names the video. Delete it, or "
            "choose another --output."
        )
    if windows and not resume:
        raise RequestError(
            f"{folder} holds {_count_windows(windows)} of an unfinished video. Continue it with --resume, delete the "
            "folder, or choose another --output."
        )


def _count_windows(indices: Sequence[int]) -> str:
    return f"{len(indices)} finished {'window' if len(indices) == 1 else 'windows'}"


class WindowFolder:
    """Windows of one video stored on disk; a `WindowStore`.

    Args:
        folder: existing folder of this video.
        indices: indices of the finished windows.
        record_kernels: returns the kernels that were chosen by timing so far; stored with each window.
    """

    def __init__(
        self, folder: Path, indices: Collection[int] = (), record_kernels: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        self.folder, self._indices, self._record_kernels = folder, set(indices), record_kernels
        self.kernels = _read_kernels(folder) if self._indices else {}  # of the windows that are finished

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        shapes: Sequence[tuple[int, ...]],
        *,
        resume: bool,
        record_kernels: Callable[[], Mapping[str, str]] = dict,
    ) -> Iterator[WindowFolder]:
        """Creates or resumes the folder of a video, and locks it against other processes.

        Args:
            identity: everything that the latents depend on, serialisable as JSON.
            shapes: shape of each window's latents. A damaged window, or one of another shape, is deleted with a
                warning and sampled again.
            record_kernels: see `WindowFolder`.

        Raises:
            RequestError: there are finished windows that are not to be resumed or belong to another video; or another
                process has locked the folder.
            CheckpointError: the folder cannot be written or read, or is of a newer kadr.
            MediaError: the metadata in it is of a newer kadr.
        """
        identity = json.loads(json.dumps(identity))
        with lock_folder(folder), remove_if_ended(partial(_remove_without_windows, folder)):
            opened = cls(folder, record_kernels=record_kernels)
            try:
                check_resumable(folder, resume=resume)
                if finished_windows(folder):
                    _check_identity(folder, identity)
                    opened = cls(folder, _intact_windows(folder, shapes), record_kernels)
                else:
                    _warn_nothing_to_resume(folder, resume=resume)
                    _write_request_file(folder, {_VIDEO_KEY: identity})
                yield opened
            finally:
                _remove_without_windows(folder)

    def has(self, index: int) -> bool:
        return index in self._indices

    def store(self, index: int, latents: Tensor) -> None:
        """Raises: CheckpointError: the file cannot be written."""
        latents = latents.float().contiguous()
        metadata = {_DIGEST_KEY: _digest(latents)}
        write_tensors(
            _window_file(self.folder, index), {_LATENTS: latents}, dtype=torch.float32, metadata=metadata, fsync=True
        )
        self._indices.add(index)
        if (kernels := dict(self._record_kernels())) != self.kernels:
            self.kernels = kernels
            _write_request_file(self.folder, {_VIDEO_KEY: _read_identity(self.folder), _KERNELS_KEY: kernels})

    def read(self, index: int) -> Tensor:
        """Raises: CheckpointError: the file is missing or damaged."""
        file = _window_file(self.folder, index)
        try:
            return read_tensors(file)[0][_LATENTS].clone()  # not the file's own memory: the file will be deleted
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}. Continue with --resume: only this window is sampled again."
            ) from error

    def remove(self) -> None:
        """Deletes all windows."""
        for index in finished_windows(self.folder):
            _window_file(self.folder, index).unlink()
        self._indices.clear()


def _write_request_file(folder: Path, data: Mapping[str, Any]) -> None:
    with atomic_path(folder / REQUEST_FILE) as temporary:
        temporary.write_text(json.dumps(WINDOW_FOLDER.stamp(data), indent=1) + "\n", "utf-8")


def _read_kernels(folder: Path) -> dict[str, str]:
    """Returns the kernels that computed the stored windows; {} where none were recorded."""
    try:
        kernels = parse_json(read_text(folder / REQUEST_FILE)).get(_KERNELS_KEY)
    except (OSError, ValueError, AttributeError):
        return {}
    return kernels if isinstance(kernels, dict) else {}


def _remove_without_windows(folder: Path) -> None:
    """Deletes a folder that has no finished window: there is nothing to resume."""
    if not finished_windows(folder):
        (folder / REQUEST_FILE).unlink(missing_ok=True)
        remove_lock(folder)


def _warn_nothing_to_resume(folder: Path, *, resume: bool) -> None:
    if resume:
        warnings.warn(
            f"there is nothing to resume in {folder}; the video starts from the beginning.", KadrWarning, stacklevel=5
        )


def _intact_windows(folder: Path, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the windows that can be reused; deletes other files with a window's name."""
    intact = []
    for index in finished_windows(folder):
        file = _window_file(folder, index)
        fault = "there is no such window" if index >= len(shapes) else _find_damage(file, shapes[index])
        if fault is None:
            intact.append(index)
            continue
        warnings.warn(
            f"{file} is damaged or of another video: {fault}. It is deleted, and sampled again.",
            KadrWarning,
            stacklevel=4,
        )
        file.unlink()
    return intact


def _find_damage(file: Path, shape: tuple[int, ...]) -> str | None:
    """Returns what is wrong with a window's file; None if it is intact."""
    try:
        tensors, metadata = read_tensors(file)
        digest, latents = metadata.get(_DIGEST_KEY), tensors[_LATENTS]
    except KeyError:
        return "it has no latents"
    except ValueError as error:
        return str(error)
    if latents.dtype != torch.float32 or tuple(latents.shape) != shape:
        return f"its latents are {latents.dtype} of {tuple(latents.shape)}"
    return None if digest == _digest(latents) else "its checksum does not match"


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.numpy().tobytes()).hexdigest()


def _window_file(folder: Path, index: int) -> Path:
    return folder / f"window-{index + 1:04}.safetensors"


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuses to resume another video.

    Raises:
        RequestError: names the differences.
        CheckpointError, MediaError, RequestError: as `_read_identity`.
    """
    differences = list(_differences(_read_identity(folder), identity))
    if execution := [line for name, line in differences if name == EXECUTION_KEY]:
        warnings.warn(
            f"the transformer runs differently than before: {execution[0]}. The remaining windows may be rounded "
            "differently.",
            KadrWarning,
            stacklevel=3,
        )
    if others := [f"{name} is {line}" for name, line in differences if name != EXECUTION_KEY]:
        more = f" and {len(others) - _MAX_DIFFERENCES} more" if len(others) > _MAX_DIFFERENCES else ""
        raise RequestError(
            f"{folder} is of another video: {'; '.join(others[:_MAX_DIFFERENCES])}{more}. Repeat the same request, "
            "delete the folder, or choose another --output."
        )


def _read_identity(folder: Path) -> dict[str, Any]:
    """Reads the stored identity of the video, upgraded to the current schemas.

    Raises:
        CheckpointError: the file cannot be read, or is of a newer kadr.
        MediaError, RequestError: the metadata or the request in it is of a newer kadr.
    """
    file = folder / REQUEST_FILE
    try:
        stored = parse_json(read_text(file))
        if not isinstance(stored, dict):
            raise ValueError("it is not a JSON object")
        identity = WINDOW_FOLDER.upgrade(stored, file).get(_VIDEO_KEY)
        if not isinstance(identity, dict):
            raise ValueError(f"it has no object {_VIDEO_KEY!r}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Delete {folder} and start again.") from error
    return upgrade_video_metadata(identity, file)


def _differences(stored: Any, requested: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields for each difference its name, and the stored and the requested value in words."""
    if isinstance(stored, dict) and isinstance(requested, dict):
        for key in dict.fromkeys((*stored, *requested)):
            inner = key if name in ("", "request") else f"{name}.{key}"
            yield from _differences(stored.get(key), requested.get(key), inner)
    elif stored != requested:
        yield name, f"{quote(stored)} there and {quote(requested)} now"
