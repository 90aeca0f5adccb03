"""Finds folders of models on this machine: $KADR_MODELS, kadr's config file, ComfyUI's extra_model_paths.yaml."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kadr.cache_home import config_home
from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.regular_file import FileTooLargeError, read_text
from kadr.validation import check_path, expand_home

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS_VARIABLE = "KADR_MODELS"  # environment variable: folders of models, separated as in PATH
CONFIG_FILE, MODELS_DIRS_KEY = "config.toml", "models_dirs"
# Real ones have a few kilobytes. Python's TOML reader takes half a minute for one key of 20,000 parts.
MAX_YAML_BYTES, MAX_TOML_BYTES = 1 << 16, 1 << 13
# Entries of extra_model_paths.yaml that are not folders of a kind.
_YAML_SETTINGS = ("base_path", "is_default")


def configured_dirs() -> tuple[Path, ...]:
    """Returns the folders of models that the environment names, then those of the config file.

    Raises:
        RequestError: the config file cannot be read, or has other keys than `models_dirs`.
    """
    from_environment = [name for name in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if name.strip()]
    return (*(expand_home(name) for name in from_environment), *_dirs_of_config_file())


def _dirs_of_config_file() -> tuple[Path, ...]:
    """Returns `models_dirs` of the config file; relative ones are relative to the file's folder."""
    try:
        file = config_home() / CONFIG_FILE
    except RuntimeError:  # no home directory, so no config file
        return ()
    if not file.is_file():
        return ()
    text = _read_text(file, MAX_TOML_BYTES)
    try:
        config = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise RequestError(f"{file} is not TOML: {_first_line(error)}. Correct it, or delete it.") from error
    if unknown := sorted(config.keys() - {MODELS_DIRS_KEY}):
        raise RequestError(f"{file} has {quote(unknown[0])}; kadr knows only {MODELS_DIRS_KEY}. Take it out.")
    dirs = config.get(MODELS_DIRS_KEY, [])
    if not isinstance(dirs, list) or not all(isinstance(name, str) and name for name in dirs):
        example = f'{MODELS_DIRS_KEY} = ["~/ComfyUI/models"]'
        raise RequestError(f"{file}: {MODELS_DIRS_KEY} must be a list of folders. Write {example}.")
    for name in dirs:
        check_path(f"a folder of {file}", name)
    return tuple(file.parent / expand_home(name) for name in dirs)


def read_extra_model_paths(file: Path) -> Iterator[tuple[str, Path]]:
    """Yields (kind, folder) of ComfyUI's extra_model_paths.yaml, the sections with `is_default` first.

    A section has a base_path, and for each kind one folder per line. A relative folder is relative to base_path, and
    that to the file's folder.

    Raises:
        RequestError: the file cannot be read, or is not of that form.
    """
    from kadr.yaml_reader import parse_yaml  # loads the YAML reader, which only such a file needs

    text = _read_text(file, MAX_YAML_BYTES)
    try:
        sections = parse_yaml(text)
    except ValueError as error:
        raise RequestError(f"{file} is not YAML: {_first_line(error)}. Correct it.") from error
    if not isinstance(sections, Mapping) or not all(isinstance(entry, Mapping | None) for entry in sections.values()):
        raise RequestError(
            f"{file} is not an extra_model_paths.yaml: it must have sections, each with folders by kind."
        )
    present = [section for section in sections.values() if section]
    for section in sorted(present, key=lambda section: section.get("is_default") is not True):
        yield from _folders_of_section(file, section)


def _folders_of_section(file: Path, section: Mapping[Any, Any]) -> Iterator[tuple[str, Path]]:
    base = file.parent / _expand(file, _require_text(file, "base_path", section.get("base_path") or "."))
    for kind, lines in section.items():
        if kind not in _YAML_SETTINGS and lines is not None:
            for line in _require_text(file, kind, lines).splitlines():
                if line.strip():
                    yield str(kind), base / _expand(file, line.strip())


def _require_text(file: Path, key: Any, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{file}: {quote(key)} is {quote(value)}; it must be text, one folder per line.")
    return value


def _expand(file: Path, text: str) -> str:
    check_path(f"a folder of {file}", text)
    return os.path.expanduser(os.path.expandvars(text))


def _read_text(file: Path, max_bytes: int) -> str:
    """Reads a text file of at most `max_bytes`; never more of a larger one.

    Raises:
        RequestError: it is larger, cannot be read, or is not text.
    """
    try:
        return read_text(file, "utf-8-sig", max_bytes=max_bytes)
    except FileTooLargeError as error:
        raise RequestError(f"{file} is not a config: {error}. Name another file.") from error
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror or error}. Make it readable.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not text in UTF-8. Save it in that encoding.") from error


def _first_line(error: Exception) -> str:
    """Returns the first line of a parser's message: the rest repeats the file's content."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
