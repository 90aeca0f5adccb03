"""`SystemMonitor`: the device, the disk and the models of the server, as every client may see them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CACHE_SECONDS = 1.0
LOW_DISK_BYTES = 2 * 10**9  # above the free bytes at which no job begins: there is time left to delete something


@dataclass(frozen=True)
class SystemFacts:
    """The server at one time.

    Args:
        device: "cpu" or "mps", or the name of the GPU.
        memory_bytes: of the device; for the CPU, no more than a container's limit.
        memory_used_bytes: of a GPU, by any program; else those that the server and its workers have in memory. None
            where the GPU does not tell.
        disk_free_bytes: of the disk with the data; None where it cannot be read.
        models: number of models.
    """

    device: str
    memory_bytes: int
    memory_used_bytes: int | None
    disk_free_bytes: int | None
    is_disk_low: bool
    models: int


@dataclass
class SystemMonitor:
    """Looks at the server, at most once a second. Threads may share it.

    Args:
        folder: of the data.
        device: of the first worker, as `Engine.open` takes it.
        min_free_bytes: of the disk; below it no job begins.
        count_models: looks into all folders of models.
        clock: monotonic seconds.
    """

    folder: Path
    device: str
    min_free_bytes: int
    count_models: Callable[[], int]
    clock: Callable[[], float] = time.monotonic
    _lock: Lock = field(default_factory=Lock, init=False)
    _facts: SystemFacts | None = field(default=None, init=False)
    _read_at: float = field(default=0.0, init=False)

    def read(self) -> SystemFacts:
        """Returns the server as it is now, or was within the last second.

        Raises:
            RequestError: there is no such device.
        """
        with self._lock:
            if self._facts is None or self.clock() - self._read_at >= CACHE_SECONDS:
                self._facts, self._read_at = self._look(), self.clock()
            return self._facts

    def _look(self) -> SystemFacts:
        import torch

        from kadr.memory.device import pick_device, total_bytes  # loads torch

        device, free = pick_device(self.device), self._disk_free_bytes()
        return SystemFacts(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            memory_bytes=total_bytes(device),
            memory_used_bytes=_memory_used_bytes(device),
            disk_free_bytes=free,
            is_disk_low=free is not None and free < self.min_free_bytes + LOW_DISK_BYTES,
            models=self.count_models(),
        )

    def _disk_free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return None


def _memory_used_bytes(device: torch.device) -> int | None:
    from kadr.memory.device import used_bytes

    try:
        return used_bytes(device)
    except RuntimeError:  # CUDA's own: a full GPU may have no room left for another process that asks
        return None
