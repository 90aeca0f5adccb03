"""Modules that are in memory only while their stage runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Shelf:
    """Lends modules and lets go of them afterwards.

    Args:
        keep: keep them for the next time instead: right where all of them fit beside each other with room to spare.
    """

    def __init__(self, *, keep: bool, device: torch.device) -> None:
        self.keep = keep
        self.device = device
        self._kept: dict[str, nn.Module] = {}

    @contextmanager
    def take(self, name: str, load: Callable[[], M]) -> Iterator[M]:
        """The module of that name on the device, loaded unless it was kept."""
        module = self._kept.pop(name, None) or load().to(self.device).eval().requires_grad_(False)
        try:
            yield module  # type: ignore[misc]
        finally:
            if self.keep:
                self._kept[name] = module
            else:
                del module
                self._release()

    def clear(self) -> None:
        """Let go of everything that is kept."""
        self._kept.clear()
        self._release()

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
