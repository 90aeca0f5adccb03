"""The engine that all nodes and all runs share: one model is in memory at a time."""

from __future__ import annotations

import threading
from typing import Any

from .kadr_package import import_kadr
from .model_options import ModelOptions

AUTO_DEVICE = "auto"


class SharedEngine:
    """Opens an engine for a model, and keeps it until another model is asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._options: ModelOptions | None = None
        self._engine: Any = None

    def get(self, options: ModelOptions) -> Any:
        """Returns the `kadr.Engine` of a model; another one before it leaves memory.

        Raises:
            KadrNotInstalledError: kadr is not installed.
            kadr.KadrError: see `kadr.Engine.open`.
        """
        wanted = options.without_strengths()
        with self._lock:
            if self._engine is None or wanted != self._options:
                arguments = wanted.engine_arguments()
                if arguments["device"] == AUTO_DEVICE:
                    arguments["device"] = comfy_device()
                engine = import_kadr().Engine.open(**arguments)  # reads headers; the old one stays if it raises
                if self._engine is not None:
                    self._engine.unload()
                self._engine, self._options = engine, wanted
            return self._engine


def comfy_device() -> str:
    """Returns the name of the device that ComfyUI computes on, such as "cpu" or "cuda:0"."""
    import comfy.model_management

    return str(comfy.model_management.get_torch_device())


SHARED_ENGINE = SharedEngine()
