"""kadr itself, which is imported when it is first needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

IS_INSTALLED = importlib.util.find_spec("kadr") is not None  # looks for the package, and does not load it


class KadrNotInstalledError(ImportError):
    """kadr is not installed where ComfyUI runs."""


def import_kadr() -> ModuleType:
    """Imports kadr.

    Raises:
        KadrNotInstalledError: says how to install it, or why it cannot be loaded.
    """
    try:
        return importlib.import_module("kadr")
    except ImportError as error:
        reason = f"kadr cannot be loaded: {error}" if IS_INSTALLED else "kadr is not installed in ComfyUI's Python"
        raise KadrNotInstalledError(f"{reason}. Install it there: {sys.executable} -m pip install kadr") from error


def release_names(kind: str) -> list[str]:
    """Returns the names of kadr's releases of a kind, such as "model" or "LoRA"; none where kadr is not installed.

    ComfyUI asks for them when it draws the nodes: they come from kadr's registry, which does not load torch.
    """
    if not IS_INSTALLED:
        return []
    registry = importlib.import_module("kadr.models.registry")
    return [release.name for release in registry.RELEASES if release.kind == kind]


def weight_formats() -> list[str]:
    """Returns the names of kadr's weight formats; none where kadr is not installed."""
    if not IS_INSTALLED:
        return []
    return list(importlib.import_module("kadr.quant.weight_formats").WEIGHT_FORMATS)
