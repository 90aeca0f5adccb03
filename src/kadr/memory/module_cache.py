"""Cache of loaded modules: each is unloaded after its stage, unless the plan has room to keep it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from kadr.memory.device import trim_heap
from kadr.memory.mapped_files import module_tensors, release_pages
from kadr.quant.layers import clear_scratch

M = TypeVar("M", bound=nn.Module)


class _Entry(NamedTuple):
    module: nn.Module
    configuration: Hashable
    private_bytes: int


class ModuleCache:
    """Loads modules for a stage; afterwards keeps those named in `names_to_keep` and frees the others.

    A module kept on the CPU still releases its mapped pages, which the system keeps cached for as long as memory is not
    needed elsewhere, and its buffers of dequantized weights. Its private weights stay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names_to_keep: Collection[str] = frozenset()
        self._entries: dict[str, _Entry] = {}

    @contextmanager
    def acquire(
        self, name: str, load: Callable[[], M], *, configuration: Hashable = None, private_bytes: int = 0
    ) -> Iterator[M]:
        """Yields the module of that name, loaded unless it is cached.

        Args:
            load: loads the module onto the device.
            configuration: how the module is placed; a cached one with another configuration is freed first.
            private_bytes: bytes of the module that stay in memory while it is cached.
        """
        entry = self._entries.pop(name, None)
        module = entry.module if entry is not None and entry.configuration == configuration else None
        entry, is_outdated = None, entry is not None and module is None
        if is_outdated:
            self._free_memory()
        if module is None:
            module = load().eval().requires_grad_(False)
        try:
            yield module  # type: ignore[misc]
        finally:
            release_pages(module_tensors(module))
            clear_scratch(module)
            is_kept = name in self.names_to_keep
            if is_kept:
                self._entries[name] = _Entry(module, configuration, private_bytes)
            del module
            if is_kept:
                trim_heap()  # its activations; collecting cycles would take longer than a small model's step
            else:
                self._free_memory()

    @property
    def cached_names(self) -> frozenset[str]:
        """Names of the cached modules."""
        return frozenset(self._entries)

    @property
    def private_bytes(self) -> int:
        """Bytes that the cached modules keep in memory, free to the stage that reuses one."""
        return sum(entry.private_bytes for entry in tuple(self._entries.values()))

    def clear(self, *, keep: Collection[str] = ()) -> None:
        """Frees all cached modules except those named in `keep`."""
        names = self._entries.keys() - set(keep)
        for name in names:
            del self._entries[name]
        if names:
            self._free_memory()

    def _free_memory(self) -> None:
        gc.collect()
        trim_heap()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            _empty_pinned_cache()


def _empty_pinned_cache() -> None:
    """Returns freed pinned memory to the system, where torch has a call for that; else torch keeps it for later."""
    empty = getattr(torch._C, "_accelerator_emptyHostCache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()
