"""Finished windows on disk, beside the video that they are for: `clip.windows` until `clip.mp4` is written.

Each is a file of its own that takes its name when it is whole, so whatever ends a run leaves only finished ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kadr.checkpoints.save import atomic_path, write_tensors
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.pipeline.longvideo.folder_lock import lock_folder, remove_lock

REQUEST_FILE = "request.json"
EXECUTION = "held"  # how the transformer is held and computed with: another way rounds otherwise
_WINDOW_FILE_NAME, _LATENTS, _DIGEST_KEY = re.compile(r"window-(\d{4,})\.safetensors"), "latents", "sha256"
_MAX_DIFFERENCES = 3  # differences that are named


def finished_windows(folder: Path) -> list[int]:
    """The numbers of the windows that are there, from 0."""
    files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    found = (_WINDOW_FILE_NAME.fullmatch(file.name) for file in files)
    return sorted(int(name[1]) - 1 for name in found if name is not None)


def stored_prompt(folder: Path, prompt: str) -> tuple[str, str | None] | None:
    """The prompt that a video was begun with, and the words it was enhanced from; None where that were other words."""
    try:
        request = json.loads((folder / REQUEST_FILE).read_text("utf-8"))["request"]
        prompt, original = request["prompt"], request["original_prompt"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # what is wrong with the folder is said when it is opened
    return (prompt, original) if prompt == (prompt if original is None else original) else None


def check_resumable(folder: Path, *, resume: bool) -> None:
    """Refuse to begin where windows are, and to go on with windows of nobody knows what.

    Raises:
        RequestError: with the way out.
    """
    kept, there = finished_windows(folder), (folder / REQUEST_FILE).is_file()
    if kept and not there:
        raise RequestError(
            f"{folder} holds {_count_windows(kept)} and no {REQUEST_FILE} that says of what. Delete it, or name another --output."
        )
    if kept and not resume:
        raise RequestError(
            f"{folder} holds {_count_windows(kept)} of a video that was not finished. Go on with it with --resume, delete "
            "the folder, or name another --output."
        )


def _count_windows(indices: Sequence[int]) -> str:
    return f"{len(indices)} finished {'window' if len(indices) == 1 else 'windows'}"


class WindowFolder:
    """The windows of one video, kept on disk. See `long.Kept`.

    Args:
        folder: exists, and is of this video.
        indices: the numbers of those that are finished.
    """

    def __init__(self, folder: Path, indices: Collection[int] = ()) -> None:
        self.folder, self._indices = folder, set(indices)

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, identity: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], *, resume: bool
    ) -> Iterator[WindowFolder]:
        """The folder of a video that begins, or goes on; no other run has it meanwhile.

        Args:
            identity: everything that the latents depend on, as JSON can hold it.
            shapes: of what each window keeps. One that is damaged, or has another, is made again, with a warning.

        Raises:
            RequestError: there are windows, and they are not to be gone on with, or are of another video; or another
                run has it.
            CheckpointError: it cannot be written or read.
        """
        identity = json.loads(json.dumps(identity))
        with lock_folder(folder):
            opened = cls(folder)
            try:
                check_resumable(folder, resume=resume)
                if finished_windows(folder):
                    _check_same(folder, identity)
                    opened = cls(folder, _intact_windows(folder, shapes))
                else:
                    _warn_nothing_to_resume(folder, resume=resume)
                    with atomic_path(folder / REQUEST_FILE) as part:
                        part.write_text(json.dumps(identity, indent=1) + "\n", "utf-8")
                yield opened
            finally:
                if not finished_windows(folder):  # nothing that could be gone on with
                    (folder / REQUEST_FILE).unlink(missing_ok=True)
                    remove_lock(folder)

    def has(self, index: int) -> bool:
        return index in self._indices

    def store(self, index: int, latents: Tensor) -> None:
        """Raises: CheckpointError: it cannot be written."""
        latents = latents.float().contiguous()
        metadata = {_DIGEST_KEY: _digest(latents)}
        write_tensors(
            _window_file(self.folder, index), {_LATENTS: latents}, dtype=torch.float32, metadata=metadata, fsync=True
        )
        self._indices.add(index)

    def read(self, index: int) -> Tensor:
        """Raises: CheckpointError: the file is gone or damaged."""
        file = _window_file(self.folder, index)
        try:
            return load_file(file)[_LATENTS].clone()  # not the file's own memory: it is to be deleted
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}. Go on with --resume: it is made again, and the others are not."
            ) from error

    def remove(self) -> None:
        """Everything that was kept."""
        for number in finished_windows(self.folder):
            _window_file(self.folder, number).unlink()
        self._indices.clear()


def _warn_nothing_to_resume(folder: Path, *, resume: bool) -> None:
    if resume:
        warnings.warn(f"there is nothing to go on with in {folder}; the video is begun.", KadrWarning, stacklevel=5)


def _intact_windows(folder: Path, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The windows that can be gone on with; what else is called so is deleted."""
    whole = []
    for number in finished_windows(folder):
        file = _window_file(folder, number)
        wrong = "there is no such window" if number >= len(shapes) else _find_damage(file, shapes[number])
        if wrong is None:
            whole.append(number)
            continue
        warnings.warn(
            f"{file} is damaged or of another video: {wrong}. It is deleted, and made again.",
            KadrWarning,
            stacklevel=4,
        )
        file.unlink()
    return whole


def _find_damage(file: Path, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a window's file; None where nothing is."""
    try:
        with safe_open(file, framework="pt") as opened:
            digest, latents = (opened.metadata() or {}).get(_DIGEST_KEY), opened.get_tensor(_LATENTS)
    except (OSError, KeyError, SafetensorError) as error:
        return str(error)
    if latents.dtype != torch.float32 or tuple(latents.shape) != shape:
        return f"its latents are {latents.dtype} of {tuple(latents.shape)}"
    return None if digest == _digest(latents) else "its checksum is another"


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.numpy().tobytes()).hexdigest()


def _window_file(folder: Path, index: int) -> Path:
    return folder / f"window-{index + 1:04}.safetensors"


def _check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another video.

    Raises:
        RequestError: with what differs.
        CheckpointError: what is kept cannot be read.
    """
    file = folder / REQUEST_FILE
    try:
        known = json.loads(file.read_text("utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Delete {folder} and begin anew.") from error
    differences = list(_differences(known, identity))
    if held := [line for name, line in differences if name == EXECUTION]:
        warnings.warn(
            f"the transformer is held in another way than before: {held[0]}. The rest may be rounded differently.",
            KadrWarning,
            stacklevel=3,
        )
    if others := [f"{name} is {line}" for name, line in differences if name != EXECUTION]:
        more = f" and {len(others) - _MAX_DIFFERENCES} more" if len(others) > _MAX_DIFFERENCES else ""
        raise RequestError(
            f"{folder} is of another video: {'; '.join(others[:_MAX_DIFFERENCES])}{more}. Ask for the same again, delete the "
            "folder, or name another --output."
        )


def _differences(stored: Any, requested: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """What differs: its name, and what it is there and here."""
    if isinstance(stored, dict) and isinstance(requested, dict):
        for key in dict.fromkeys((*stored, *requested)):
            inner = key if name in ("", "request") else f"{name}.{key}"
            yield from _differences(stored.get(key), requested.get(key), inner)
    elif stored != requested:
        yield name, f"{stored!r} there and {requested!r} now"
