"""Paths in a file's metadata: relative to the file where they lie beside it, so that both can move together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

RELATIVE_PREFIX = "./"  # of a path in the folder of the file, or below it; others are absolute
PROMPT_KEYS = {"prompt", "negative_prompt", "original_prompt"}  # that may look like paths


def with_relative_paths(metadata: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns metadata in which what lies in the folder of a file, or below it, is relative to that folder."""
    folders = {os.path.abspath(file.parent), os.path.realpath(file.parent)}

    def shorten(text: str) -> str:
        if not os.path.isabs(text) or "\0" in text:
            return text
        for folder in folders:
            if PurePath(text).is_relative_to(folder) and PurePath(text) != PurePath(folder) and os.path.exists(text):
                return RELATIVE_PREFIX + PurePath(text).relative_to(folder).as_posix()
        return text

    return _map_texts(metadata, shorten)


def with_absolute_paths(metadata: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns the metadata that were read from a file, with paths that are relative to its folder made absolute."""
    folder = os.path.abspath(file.parent)

    def extend(text: str) -> str:
        return os.path.normpath(os.path.join(folder, text)) if text.startswith(RELATIVE_PREFIX) else text

    return _map_texts(metadata, extend)


def _map_texts(metadata: Mapping[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    """Applies a function to all texts but prompts."""

    def apply(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: item if key in PROMPT_KEYS else apply(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [apply(item) for item in value]
        return function(value) if isinstance(value, str) else value

    mapped: dict[str, Any] = apply(metadata)
    return mapped
