"""`BatchRow`: a row as one video: its request, the engine that makes it, and the key by which it is known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kadr.jobs.job import canonical_json
from kadr.request.request import Request

_KEY_DIGITS = 32
_EMPTY_REQUEST = Request("").to_json()
_PATHS_OF_ENGINE = ("model", "vae", "text_encoder", "second_model")
_PATH_LISTS_OF_ENGINE = ("loras", "upscaler")


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """A row that can be a video.

    Args:
        number, line: of the row; see `TableRow`.
        request: paths of its media are absolute. Its length stays open where it is given in seconds.
        engine: arguments of `Engine.open` that tell the model; see `NewJob.engine`. Paths of files are absolute.
        seconds: length instead of the frames of the request; None for those.
        output: name of the video's file; None for one that is made of the prompt.
        key: tells it from rows that ask for another video.
        work: how much there is to compute, in a unit of its own; 0.0 before the row is checked.
    """

    number: int
    line: int
    request: Request
    engine: Mapping[str, Any]
    seconds: float | None = None
    output: str | None = None
    key: str = ""
    work: float = 0.0

    def with_key(self, folder: Path, repetition: int) -> BatchRow:
        """Returns the row with its key.

        Two rows have one key if they ask for the same video, in whatever words and from whatever folder. A request's
        field that has its default value does not count, so that fields of later versions change no key.

        Args:
            folder: of the batch's file: what lies beside it may move along with it.
            repetition: number of rows before it that ask for the same video.
        """
        request = {name: value for name, value in self.request.to_json().items() if value != _EMPTY_REQUEST.get(name)}
        content = {
            "request": _drop_none(_with_portable_media(request, folder)),
            "engine": _with_portable_files(self.engine, folder),
            "seconds": self.seconds,
            "output": self.output,
            "repetition": repetition,
        }
        return replace(self, key=hashlib.sha256(canonical_json(content).encode()).hexdigest()[:_KEY_DIGITS])


def key_rows(rows: list[BatchRow], folder: Path) -> list[BatchRow]:
    """Returns the rows with their keys, each another one; see `BatchRow.with_key`."""
    counts: dict[str, int] = {}
    keyed = []
    for row in rows:
        first_key = row.with_key(folder, 0).key
        repetition = counts.get(first_key, 0)
        counts[first_key] = repetition + 1
        keyed.append(row.with_key(folder, repetition))
    return keyed


def _with_portable_media(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    portable = dict(request)
    for name in ("conditions", "controls"):
        if items := request.get(name):
            portable[name] = [{**item, "media": _portable_path(item["media"], folder)} for item in items]
    if "input_video" in request:
        portable["input_video"] = _portable_path(request["input_video"], folder)
    return portable


def _with_portable_files(engine: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    portable = dict(engine)
    for name in _PATHS_OF_ENGINE:
        if name in engine:
            portable[name] = _portable_path(engine[name], folder)
    for name in _PATH_LISTS_OF_ENGINE:
        if name in engine:
            portable[name] = [_portable_item(item, folder) for item in engine[name]]
    return portable


def _portable_item(item: Any, folder: Path) -> Any:
    """Returns an entry of a list of files: a path, or a path with the strengths of a LoRA."""
    if isinstance(item, str):
        return _portable_path(item, folder)
    path, *strengths = item
    return [_portable_path(path, folder), *strengths]


def _portable_path(path: str, folder: Path) -> str:
    """Returns an absolute path relative to a folder, with slashes; a name of a model stays as it is."""
    if not os.path.isabs(path):
        return path
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return Path(path).as_posix()


def _drop_none(value: Any) -> Any:
    """Returns plain data without fields that are None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _drop_none(item) for name, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list) else value
