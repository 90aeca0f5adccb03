"""Finished windows on disk, beside the video that they are for: `clip.windows` until `clip.mp4` is written.

Each is a file of its own that takes its name when it is whole, so whatever ends a run leaves only finished ones.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kadr.checkpoints.save import beside, write_tensors
from kadr.errors import CheckpointError, KadrWarning, RequestError

REQUEST = "request.json"
HELD = "held"  # how the transformer is held and computed with: another way rounds otherwise
_NAME, _LATENTS = re.compile(r"window-(\d{4,})\.safetensors"), "latents"
_SAID = 3  # differences that are named


def folder_of(video: Path) -> Path:
    """Where the windows of a video are kept while it is made."""
    return video.with_suffix(".windows")


def finished_in(folder: Path) -> int:
    """How many windows are there, one after the other from the first."""
    number = 0
    while _file(folder, number).is_file():
        number += 1
    return number


def enhanced_in(folder: Path, words: str) -> str | None:
    """The prompt that somebody's words were enhanced to when a video was begun; None where they were not."""
    try:
        request = json.loads((folder / REQUEST).read_text("utf-8"))["request"]
        return request["prompt"] if request["original_prompt"] == words else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # what is wrong with the folder is said when it is opened


class WindowFolder:
    """The windows of one video, kept on disk. See `long.Kept`.

    Args:
        folder: exists, and is of this video.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> WindowFolder:
        """The folder of a video that begins, or goes on.

        Args:
            identity: everything that the latents depend on, as JSON can hold it.

        Raises:
            RequestError: there are windows and they are not to be gone on with; or there is nothing to go on with, or
                it is of another video.
            CheckpointError: it cannot be written or read.
        """
        identity = json.loads(json.dumps(identity))
        if resume:
            _check_same(folder, identity)
            return cls(folder)
        if count := finished_in(folder):
            raise RequestError(
                f"{folder} holds {count} finished {'window' if count == 1 else 'windows'} of a video that was not "
                "finished. Go on with it with --resume, delete the folder, or name another --output."
            )
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {folder} for finished windows cannot be made: {error.strerror or error}. Name another "
                "--output."
            ) from error
        with beside(folder / REQUEST) as part:
            part.write_text(json.dumps(identity, indent=1) + "\n", "utf-8")
        return cls(folder)

    @property
    def finished(self) -> int:
        return finished_in(self.folder)

    def keep(self, number: int, latents: Tensor) -> None:
        """Raises: CheckpointError: it cannot be written."""
        write_tensors(_file(self.folder, number), {_LATENTS: latents}, dtype=torch.float32)

    def read(self, number: int) -> Tensor:
        """Raises: CheckpointError: the file is gone or damaged."""
        file = _file(self.folder, number)
        try:
            return load_file(file)[_LATENTS].clone()  # not the file's own memory: it is to be deleted
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}. Delete it and those after it, and go on with --resume."
            ) from error

    def remove(self) -> None:
        """Everything that was kept, and the folder, unless somebody has put something else there."""
        for file in [self.folder / REQUEST, *self.folder.iterdir()]:
            if file.name == REQUEST or _NAME.fullmatch(file.name):
                file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _file(folder: Path, number: int) -> Path:
    return folder / f"window-{number + 1:04}.safetensors"


def _check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another video.

    Raises:
        RequestError: with what differs.
        CheckpointError: what is kept cannot be read.
    """
    file = folder / REQUEST
    if not file.is_file():
        raise RequestError(f"there is nothing to go on with: {folder} is not there. Leave out --resume to begin.")
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Delete {folder} and begin anew.") from error
    differences = list(_differences(known, identity))
    if held := [line for name, line in differences if name == HELD]:
        warnings.warn(
            f"the transformer is held in another way than before: {held[0]}. The rest may be rounded differently.",
            KadrWarning,
            stacklevel=3,
        )
    if others := [f"{name} is {line}" for name, line in differences if name != HELD]:
        more = f" and {len(others) - _SAID} more" if len(others) > _SAID else ""
        raise RequestError(
            f"{folder} is of another video: {'; '.join(others[:_SAID])}{more}. Ask for the same again, delete the "
            "folder, or name another --output."
        )


def _differences(known: Any, asked: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """What differs: its name, and what it is there and here."""
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in dict.fromkeys((*known, *asked)):
            inner = key if name in ("", "request") else f"{name}.{key}"
            yield from _differences(known.get(key), asked.get(key), inner)
    elif known != asked:
        yield name, f"{known!r} there and {asked!r} now"
