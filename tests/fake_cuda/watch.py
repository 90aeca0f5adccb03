"""Reports what makes the host wait for the GPU, and accesses to memory that no event orders."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_cuda.runtime import Runtime, Stream, address

PACKAGE = str(Path("src", "kadr"))
# Operations whose result the host needs: its value, or the shape that depends on values.
READS_VALUES = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
)
COPIES = ("_to_copy", "copy_")


class Wait(NamedTuple):
    """One wait of the host for the GPU.

    Args:
        kind: "reads a value", "blocking copy" or "drains a stream".
        line: of kadr, "file.py:12 function".
    """

    kind: str
    operation: str
    line: str


class _Access(NamedTuple):
    """One access to memory: the queue that it was launched on, and its number there."""

    queue: str
    ticks: int
    description: str


@dataclass
class _Accesses:
    """The last write to one piece of memory, what each queue has read since, and the stream that allocated it."""

    write: _Access | None = None
    owner: Stream | None = None
    reads: dict[str, _Access] = field(default_factory=dict)


class DeviceWatch(TorchDispatchMode):
    """Watches all operations inside its block.

    Attributes:
        waits: waits of the host, in order.
        races: accesses to memory of the GPU, or pinned memory, that come after others without waiting for them.
        count: operations on the GPU.
    """

    def __init__(self, gpu: Runtime) -> None:
        super().__init__()
        self.gpu = gpu
        self.waits: list[Wait] = []
        self.races: list[str] = []
        self.count = 0
        self._accesses: dict[int, _Accesses] = {}
        self._freed: dict[str, list[_Access]] = {}  # by the stream that it was allocated on
        gpu.on_drain = lambda: self._report("drains a stream", "synchronize")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        kind = self._wait_kind(name, inputs, args, kwargs)
        if kind is not None:
            self._report(kind, name)
        self._take_freed()
        output = function(*args, **kwargs)
        self._take_freed()
        self._track(function, name, inputs, _tensors(output), args, kwargs)
        if kind is not None:
            self.gpu.host.wait_for(self.gpu.current_stream().seen)
        return output

    def _take_freed(self) -> None:
        """Moves the accesses to freed memory to the stream that it goes back to: that may give it out again at once."""
        for memory in torch.ops.fake_cuda.take_freed():
            accesses = self._accesses.pop(memory, None)
            recorded = {name for other, name in self.gpu.recorded if other == memory}
            self.gpu.recorded -= {(memory, name) for name in recorded}
            if accesses is not None and accesses.owner is not None:
                self._freed.setdefault(accesses.owner.name, []).extend(
                    access
                    for access in (accesses.write, *accesses.reads.values())
                    if access is not None and access.queue not in recorded
                )

    def _report(self, kind: str, operation: str) -> None:
        if self.gpu.is_capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation} {kind}")
        self.waits.append(Wait(kind, operation, _kadr_line()))

    def _wait_kind(self, name: str, inputs: list[Tensor], args: Any, kwargs: Any) -> str | None:
        is_on_gpu = any(tensor.is_cuda for tensor in inputs)
        self.count += is_on_gpu
        if is_on_gpu and (name in READS_VALUES or (name == "index" and _has_mask(args))):
            return "reads a value"
        return "blocking copy" if name in COPIES and _is_blocking_copy(name, args, kwargs) else None

    def _track(
        self, function: Any, name: str, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any
    ) -> None:
        """Compares the accesses of an operation with those before."""
        tensors = [tensor for tensor in (*inputs, *outputs) if _is_tracked(tensor)]
        allocated = {address(tensor) for tensor in outputs} - {address(tensor) for tensor in inputs}
        if self.gpu.is_capturing:  # nothing runs
            for memory in allocated:
                self._accesses.pop(memory, None)
            return
        written = {address(tensor) for tensor in _written(function, args, kwargs)}
        if not tensors or not (written or allocated or name in READS_VALUES):
            return  # nothing, or a view
        queue = self.gpu.current_stream() if any(tensor.is_cuda for tensor in tensors) else self.gpu.host
        queue.wait_for(self.gpu.host.seen)  # the host launched it after all that
        where = _Access(queue.name, queue.launch(), f"{name} at {_kadr_line()} on {queue.name}")
        for before in self._freed.pop(queue.name, ()) if allocated else ():
            self._check_order(before, queue, where)
        for memory in {address(tensor) for tensor in tensors}:
            if memory in allocated:  # from the stream's own pool: what its earlier work still uses may be given out
                # Pinned memory has no owner: before it is given out again, torch waits for the copies that use it.
                self._accesses[memory] = _Accesses(where, None if queue is self.gpu.host else queue)
            elif memory in written:
                self._write(memory, queue, where)
            else:
                self._read(memory, queue, where)

    def _write(self, memory: int, queue: Stream, access: _Access) -> None:
        accesses = self._accesses.setdefault(memory, _Accesses())
        for before in (accesses.write, *accesses.reads.values()):
            self._check_order(before, queue, access)
        self._accesses[memory] = _Accesses(access, accesses.owner)

    def _read(self, memory: int, queue: Stream, access: _Access) -> None:
        accesses = self._accesses.setdefault(memory, _Accesses())
        self._check_order(accesses.write, queue, access)
        accesses.reads[queue.name] = access

    def _check_order(self, before: _Access | None, queue: Stream, access: _Access) -> None:
        if before is not None and queue.seen.get(before.queue, 0) < before.ticks:
            self.races.append(f"{access.description} does not wait for {before.description}")


def _is_blocking_copy(name: str, args: Any, kwargs: Any) -> bool:
    """Tells if a copy makes the host wait: any to or from a GPU that is not asynchronous and of pinned memory."""
    if name == "copy_":
        target, source = args[:2]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        devices, host = (target.device.type, source.device.type), source if target.is_cuda else target
    else:
        source, device = args[0], kwargs.get("device")
        non_blocking = kwargs.get("non_blocking", False)
        devices, host = (torch.device(device or source.device).type, source.device.type), source
        if devices == ("cpu", "cuda"):
            return not non_blocking  # torch then copies to pinned memory
    if set(devices) != {"cpu", "cuda"}:
        return False
    return not (non_blocking and torch.ops.fake_cuda.is_pinned(host))


def _has_mask(args: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _is_tracked(tensor: Tensor) -> bool:
    return tensor.is_cuda or bool(torch.ops.fake_cuda.is_pinned(tensor))


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Returns the arguments that an operation writes."""
    written: list[Any] = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(kwargs.get(argument.name) if argument.kwarg_only or index >= len(args) else args[index])
    return _tensors(written)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _kadr_line() -> str:
    """Returns the innermost line of kadr on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if PACKAGE in code.co_filename:
            return f"{code.co_filename.rpartition(PACKAGE)[2][1:]}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "outside kadr"


def describe(waits: Iterable[Wait]) -> str:
    """Returns waits as lines."""
    return "\n".join(f"{wait.line}: {wait.kind} ({wait.operation})" for wait in waits)
