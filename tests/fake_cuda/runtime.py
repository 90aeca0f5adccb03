"""The part of `torch.cuda` that kadr uses, for one emulated GPU: its memory, streams, events and graphs.

Work runs when it is launched. A GPU may run it later, in any order that streams and events allow: each stream counts
its work and knows how much of the others' is done before its own, and `watch.DeviceWatch` compares accesses to memory
with that.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
GIB = 1 << 30


class Stream:
    """A queue of work. `seen`: for each queue, how much of its work is done before what is launched here next."""

    _names = itertools.count()

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.name = DEVICE, f"stream {next(self._names)}"
        self.ticks, self.seen = 0, dict[str, int]()

    def launch(self) -> int:
        """Adds one piece of work, and returns its number."""
        self.ticks += 1
        self.seen[self.name] = self.ticks
        return self.ticks

    def wait_for(self, seen: dict[str, int]) -> None:
        """Lets what comes next wait for work that others have seen."""
        for name, ticks in seen.items():
            self.seen[name] = max(self.seen.get(name, 0), ticks)

    def wait_event(self, event: Event) -> None:
        self.wait_for(event.seen)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_for(stream.seen)

    def synchronize(self) -> None:
        runtime().wait_on_host(self.seen, self, drains=True)


class Event:
    """A point in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.seen, self.stream, self.ticks, self.seconds = dict[str, int](), None, 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or runtime().current_stream()
        self.seen, self.ticks, self.seconds = dict(self.stream.seen), self.stream.ticks, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or runtime().current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is not None:
            runtime().wait_on_host(self.seen, self.stream, drains=self.ticks == self.stream.ticks)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.seconds - self.seconds)


class CUDAGraph:
    """The operations of a capture, on the tensors that it was captured with."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        runtime().replays += 1
        for function, args, kwargs, captured in self.operations:
            for tensor, result in zip(_tensors(captured), _tensors(function(*args, **kwargs)), strict=True):
                if tensor.untyped_storage().data_ptr() != result.untyped_storage().data_ptr():
                    tensor.copy_(result)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, output))
        return output


class Runtime:
    """State of the emulated GPU.

    Args:
        capability: compute capability.
        total_bytes: its memory.

    Attributes:
        replays: number of CUDA graphs that were replayed.
        kernel_calls: number of calls of each Triton kernel; see `kernels`.
    """

    def __init__(self, capability: tuple[int, int], total_bytes: int) -> None:
        self.capability, self.total_bytes = capability, total_bytes
        self.host, self.default_stream = Stream(), Stream()
        self.streams = [self.default_stream]
        self.is_capturing, self.replays = False, 0
        self.kernel_calls: Counter[str] = Counter()
        self.recorded: set[tuple[int, str]] = set()  # addresses of memory, and streams that it must outlive
        self.on_drain: Callable[[], None] | None = None  # called where the host waits for all work of a stream

    def current_stream(self, device: Any = None) -> Stream:
        return self.streams[-1]

    def wait_on_host(self, seen: dict[str, int], stream: Stream, *, drains: bool) -> None:
        """Lets the host wait. drains: for the last work of the stream, so that the GPU then has nothing to do."""
        self.host.wait_for(seen)
        if drains and self.on_drain is not None:
            self.on_drain()

    def synchronize(self, device: Any = None) -> None:
        self.wait_on_host(self.default_stream.seen, self.default_stream, drains=True)

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        self.streams.append(stream or self.current_stream())
        try:
            yield
        finally:
            self.streams.pop()

    @contextmanager
    def graph(self, graph: CUDAGraph, pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
        self.synchronize()  # as torch does
        self.is_capturing = True
        try:
            with self.stream(stream), _Recorder(graph):
                yield
        finally:
            self.is_capturing = False

    def free_bytes(self) -> int:
        return self.total_bytes - torch.ops.fake_cuda.memory_allocated()

    def patches(self) -> dict[str, Any]:
        """Returns what replaces the members of `torch.cuda`."""

        @contextmanager
        def on_device(device: Any) -> Iterator[None]:
            yield

        memory, name = torch.ops.fake_cuda, "Emulated GPU"
        properties = SimpleNamespace(
            name=name,
            total_memory=self.total_bytes,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=132,
        )
        return {
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "is_initialized": lambda: True,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "device": on_device,
            "get_device_name": lambda device=None: name,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": lambda device=None: properties,
            "mem_get_info": lambda device=None: (self.free_bytes(), self.total_bytes),
            "memory_allocated": lambda device=None: memory.memory_allocated(),
            "memory_reserved": lambda device=None: memory.memory_allocated(),
            "max_memory_allocated": lambda device=None: memory.max_memory_allocated(),
            "reset_peak_memory_stats": lambda device=None: memory.reset_peak(),
            "empty_cache": lambda: None,
            "synchronize": self.synchronize,
            "Stream": Stream,
            "Event": Event,
            "current_stream": self.current_stream,
            "stream": self.stream,
            "CUDAGraph": CUDAGraph,
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, 0),
            "is_current_stream_capturing": lambda: self.is_capturing,
        }


_runtime: list[Runtime] = []


def runtime() -> Runtime:
    """Returns the runtime in use."""
    return _runtime[-1]


@contextmanager
def emulated_cuda(capability: tuple[int, int] = (9, 0), total_bytes: int = 24 * GIB) -> Iterator[Runtime]:
    """Lets torch have one CUDA device, for the duration of the block."""
    gpu = Runtime(capability, total_bytes)
    _runtime.append(gpu)
    with pytest.MonkeyPatch.context() as patch:
        for member, value in gpu.patches().items():
            patch.setattr(torch.cuda, member, value)
        patch.setattr(torch.backends.cudnn, "version", lambda: 91600)
        patch.setattr(torch._C, "_accelerator_emptyHostCache", lambda: None, raising=False)
        patch.setattr(torch, "empty", _empty_or_pinned)
        patch.setattr(
            torch.Tensor, "record_stream", lambda self, stream: gpu.recorded.add((address(self), stream.name))
        )
        patch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: _pin(self))
        patch.setattr(torch.Tensor, "is_pinned", lambda self, device=None: torch.ops.fake_cuda.is_pinned(self))
        try:
            yield gpu
        finally:
            _runtime.pop()


def address(tensor: torch.Tensor) -> int:
    """Returns the address of a tensor's memory, which its views share."""
    return tensor.untyped_storage().data_ptr()


_torch_empty = torch.empty


def _empty_or_pinned(*size: Any, pin_memory: bool = False, dtype: torch.dtype | None = None, **options: Any) -> Any:
    if not pin_memory:
        return _torch_empty(*size, dtype=dtype, **options)
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return torch.ops.fake_cuda.pinned_empty(list(shape), dtype or torch.get_default_dtype())


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.ops.fake_cuda.pinned_empty(list(tensor.shape), tensor.dtype)
    return pinned.copy_(tensor)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
