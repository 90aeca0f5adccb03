"""Modules that are in memory only while their stage runs, or for as long as there is room."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from kadr.memory.block_swap import PageAdvice, module_tensors
from kadr.memory.device import trim_heap
from kadr.quant.layers import clear_scratch

M = TypeVar("M", bound=nn.Module)


class _Entry(NamedTuple):
    module: nn.Module
    configuration: Hashable


class ModuleCache:
    """Lends modules. Afterwards it keeps those named in `names_to_keep`, and lets go of the others.

    A module that is kept on the CPU lets go of its pages of files all the same: the system has them at hand still, and
    gives them to others if it must. It lets go of what weights were unpacked into, too. Weights that it made for itself
    stay.

    Args:
        release_pages: lets go of the pages under tensors.
    """

    def __init__(self, device: torch.device, *, release_pages: PageAdvice) -> None:
        self.device = device
        self.names_to_keep: Collection[str] = frozenset()
        self._release_pages = release_pages
        self._entries: dict[str, _Entry] = {}

    @contextmanager
    def acquire(self, name: str, load: Callable[[], M], *, configuration: Hashable = None) -> Iterator[M]:
        """The module of that name, loaded unless it was kept.

        Args:
            load: makes it, on the device.
            configuration: how it is held; one that was kept in another way is let go of first.
        """
        kept = self._entries.pop(name, None)
        module = kept.module if kept is not None and kept.configuration == configuration else None
        kept, another = None, kept is not None and module is None
        if another:
            self._free_memory()
        if module is None:
            module = load().eval().requires_grad_(False)
        try:
            yield module  # type: ignore[misc]
        finally:
            self._release_pages(module_tensors(module))
            clear_scratch(module)
            stays = name in self.names_to_keep
            if stays:
                self._entries[name] = _Entry(module, configuration)
            del module
            if stays:
                trim_heap()  # what it worked with; to look for cycles would take longer than a small model's step
            else:
                self._free_memory()

    @property
    def cached_names(self) -> frozenset[str]:
        """The names of the modules it has."""
        return frozenset(self._entries)

    def clear(self, *, keep: Collection[str] = ()) -> None:
        """Let go of everything that is kept, but for some names."""
        gone = self._entries.keys() - set(keep)
        for name in gone:
            del self._entries[name]
        if gone:
            self._free_memory()

    def _free_memory(self) -> None:
        gc.collect()
        trim_heap()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
