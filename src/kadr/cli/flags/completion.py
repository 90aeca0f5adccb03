"""Shell completion of values: choices, names of released models and files. Loads no torch."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable

from kadr.models.registry import LORA, MODEL_RELEASES, RELEASES

Completer = Callable[[str], list[str]]  # from what is typed so far

_CHOICES = re.compile(r"[\w.-]+(\|[\w.-]+)+")  # of a flag's metavar: auto|cpu|cuda
_ELLIPSIS = "..."
_KINDS_BY_FLAG = {
    "--upscaler": ("spatial upscaler", "temporal upscaler"),
    "--text-encoder": ("text encoder",),
    "--lora": (LORA,),
}


def completer_for(flag: str, metavar: str | None) -> Completer | None:
    """Returns what completes a flag's value; None where the shell's own way or none does."""
    metavar = metavar or ""
    if "NAME" in metavar.split("|") or metavar.startswith("NAME"):
        return release_completer(*_KINDS_BY_FLAG.get(flag, ("model",)), with_files="PATH" in metavar)
    if flag == "--config":
        return _complete_config
    if _CHOICES.fullmatch(metavar) and metavar.lower() != metavar.upper():
        choices = [choice for choice in metavar.split("|") if choice != _ELLIPSIS and not choice.isupper()]
        return (lambda incomplete: _begun(choices, incomplete)) if len(choices) > 1 else None
    return None


def release_completer(*kinds: str, with_files: bool = False) -> Completer:
    """Returns what completes names of releases of these kinds, or of all where none is named."""

    def complete(incomplete: str) -> list[str]:
        names = _begun((release.name for release in RELEASES if not kinds or release.kind in kinds), incomplete)
        return names + (_files(incomplete) if with_files else [])

    return complete


def _complete_config(incomplete: str) -> list[str]:
    return _begun((release.name for release in MODEL_RELEASES if release.repo), incomplete) + _files(incomplete)


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _files(incomplete: str) -> list[str]:
    paths = glob.glob(f"{glob.escape(os.path.expanduser(incomplete))}*")
    return sorted(f"{path}/" if os.path.isdir(path) else path for path in paths)
