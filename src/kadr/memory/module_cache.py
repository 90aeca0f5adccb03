"""Modules that are in memory only while their stage runs, or for as long as there is room."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from kadr.memory.block_swap import Pages, weights
from kadr.memory.device import give_back
from kadr.quant.layers import clear_scratch

M = TypeVar("M", bound=nn.Module)


class _Kept(NamedTuple):
    module: nn.Module
    way: Hashable


class Shelf:
    """Lends modules. Afterwards it keeps those named in `keep`, and lets go of the others.

    A module that is kept on the CPU lets go of its pages of files all the same: the system has them at hand still, and
    gives them to others if it must. It lets go of what weights were unpacked into, too. Weights that it made for itself
    stay.

    Args:
        pages: lets go of the pages under tensors.
    """

    def __init__(self, device: torch.device, *, pages: Pages) -> None:
        self.device = device
        self.keep: Collection[str] = frozenset()
        self._pages = pages
        self._kept: dict[str, _Kept] = {}

    @contextmanager
    def take(self, name: str, load: Callable[[], M], *, way: Hashable = None) -> Iterator[M]:
        """The module of that name, loaded unless it was kept.

        Args:
            load: makes it, on the device.
            way: how it is held; one that was kept in another way is let go of first.
        """
        kept = self._kept.pop(name, None)
        module = kept.module if kept is not None and kept.way == way else None
        kept, another = None, kept is not None and module is None
        if another:
            self._release()
        if module is None:
            module = load().eval().requires_grad_(False)
        try:
            yield module  # type: ignore[misc]
        finally:
            self._pages(weights(module))
            clear_scratch(module)
            stays = name in self.keep
            if stays:
                self._kept[name] = _Kept(module, way)
            del module
            if stays:
                give_back()  # what it worked with; to look for cycles would take longer than a small model's step
            else:
                self._release()

    @property
    def kept(self) -> frozenset[str]:
        """The names of the modules it has."""
        return frozenset(self._kept)

    def clear(self, *, but: Collection[str] = ()) -> None:
        """Let go of everything that is kept, but for some names."""
        gone = self._kept.keys() - set(but)
        for name in gone:
            del self._kept[name]
        if gone:
            self._release()

    def _release(self) -> None:
        gc.collect()
        give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
