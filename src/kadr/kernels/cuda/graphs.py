"""CUDA graphs: captures the work for each shape of the inputs once, and replays it as a whole.

A transformer block is dozens of kernel launches of a few microseconds each on the host. Where the GPU runs the kernels
faster than that, as with fewer than about a thousand tokens, it waits for the host; a graph is one launch.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from kadr.cancellation import check_cancelled, use_token
from kadr.errors import KadrError, KadrWarning
from kadr.kernels import mode
from kadr.kernels.error_kinds import is_fatal_cuda_error, is_out_of_memory

GRAPH_MAX_RELATIVE_ERROR = 0.01  # of a replay against the eager call; a graph that differs by more is dropped
MAX_GRAPHS = 4  # two passes, with and without STG-perturbed blocks
MAX_TRACKED_SHAPES = 64  # shapes remembered as warmed up, or as failed


class GraphBackend(Protocol):
    """Captures and replays graphs."""

    def can_capture(self, device: torch.device) -> bool:
        """Returns whether work on a device can be captured now."""

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        """Runs `function` on the stream that captures, so that libraries finish their one-time setup."""

    def capture(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Captures `function` without running it. Returns a callable that replays it, and its static output."""


class CudaGraphBackend:
    """CUDA's own graphs. Those of a device run one at a time, so all share one memory pool for intermediates."""

    def __init__(self) -> None:
        self._streams_and_pools: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}

    def can_capture(self, device: torch.device) -> bool:
        """See `GraphBackend.can_capture`. False during another capture."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        """See `GraphBackend.warm_up`."""
        with torch.cuda.device(device):
            stream, _ = self._stream_and_pool(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = function()
            torch.cuda.current_stream().wait_stream(stream)
        return output

    def capture(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """See `GraphBackend.capture`. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream, pool = self._stream_and_pool(device)
            # torch's context leaves its stream current where ending the capture fails; the one around it does not.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                output = function()
        return graph.replay, output

    def _stream_and_pool(self, device: torch.device) -> tuple[torch.cuda.Stream, Any]:
        """Returns the capture stream of a device and its memory pool."""
        if device not in self._streams_and_pools:
            self._streams_and_pools[device] = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        return self._streams_and_pools[device]


class CapturedGraph:
    """A captured graph with its static inputs and output.

    Attributes:
        run_eagerly: does the same work on the static inputs, without the graph.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], backend: GraphBackend) -> None:
        static_arguments = _empty_like(arguments)
        self._static_inputs = tensors_in(static_arguments)
        self._copied_versions: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(self._static_inputs)
        self._copy_inputs(tensors_in(arguments))
        self.run_eagerly = lambda: function(*static_arguments)
        self._replay, self._static_output = backend.capture(self.run_eagerly, self._static_inputs[0].device)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        self._copy_inputs(tensors_in(arguments))
        self._replay()
        return _clone(self._static_output)  # the next replay overwrites it

    def _copy_inputs(self, inputs: list[Tensor]) -> None:
        """Copies the inputs that mapped since the last call: most inputs of a step are those of the step before."""
        for index, (tensor, static_input) in enumerate(zip(inputs, self._static_inputs, strict=True)):
            if tensor.is_inference():  # has no version counter
                static_input.copy_(tensor)
                continue
            copied = self._copied_versions[index]
            if copied is None or copied[0]() is not tensor or copied[1] != tensor._version:
                static_input.copy_(tensor)
                self._copied_versions[index] = weakref.ref(tensor), tensor._version


class GraphedCallable:
    """Wraps a function of tensors and replays a CUDA graph for input shapes it has seen before.

    The first call with a shape warms up, the second captures, and later calls replay. A shape used only once adds no
    cost. The warm-up also compiles kernels and tests them, which is not allowed during capture. The first replay is
    compared with an eager call before the graph is used.

    For equal shapes the function must do the same work: it must not read tensor values on the host, must be
    stateless, and the tensors that are not arguments (weights) must keep their addresses. Off CUDA, and
    if a capture fails, the function is called directly; a failed capture gives a warning.

    Args:
        function: takes tensors and tuples of them, on one device. Other arguments are part of the shape, and must be
            hashable. Returns a tensor or a tuple.
        max_graphs: graphs in the cache; the least recently used is evicted.
        backend: captures the graphs; None is CUDA.

    Attributes:
        replay_count: number of calls that were replays.
    """

    def __init__(
        self, function: Callable[..., Any], *, max_graphs: int = MAX_GRAPHS, backend: GraphBackend | None = None
    ) -> None:
        self.function, self.max_graphs, self.replay_count = function, max_graphs, 0
        self._backend: GraphBackend = backend or CudaGraphBackend()
        self._graphs: OrderedDict[Hashable, CapturedGraph] = OrderedDict()
        self._warmed_up_shapes: deque[Hashable] = deque(maxlen=MAX_TRACKED_SHAPES)
        self._failed_shapes: deque[Hashable] = deque(maxlen=MAX_TRACKED_SHAPES)

    def __call__(self, *arguments: Any) -> Any:
        """Calls `function`, or replays its graph. The result belongs to the caller: no later call overwrites it."""
        check_cancelled()
        tensors = tensors_in(arguments)
        if not self._can_capture(tensors):
            return self.function(*arguments)
        shape = mode.current(), _map_leaves(_shape_key, arguments)  # a mode has its own kernels
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            self.replay_count += 1
            return self._graphs[shape](arguments)
        if shape in self._failed_shapes:
            return self.function(*arguments)
        if shape not in self._warmed_up_shapes:
            output = self._warm_up(arguments)
            self._warmed_up_shapes.append(shape)  # only now: a warm-up that was cancelled has compiled but some kernels
            return output
        return self._capture_and_replay(shape, arguments)

    def clear(self) -> None:
        """Drops all graphs and frees their memory, for instance before weights move."""
        self._graphs.clear()

    def _can_capture(self, tensors: list[Tensor]) -> bool:
        devices = {tensor.device for tensor in tensors}
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return len(devices) == 1 and not needs_gradient and self._backend.can_capture(devices.pop())

    def _warm_up(self, arguments: tuple[Any, ...]) -> Any:
        """Runs on copies with the strides and alignment of the capture: kernels are compiled for these."""
        copies = _empty_like(arguments)
        for copy, tensor in zip(tensors_in(copies), tensors_in(arguments), strict=True):
            copy.copy_(tensor)
        return _clone(self._backend.warm_up(lambda: self.function(*copies), tensors_in(copies)[0].device))

    def _capture_and_replay(self, shape: Hashable, arguments: tuple[Any, ...]) -> Any:
        """Captures, and returns the output of the first replay if it is correct, else that of a direct call."""
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        try:
            graph, output = self._capture_and_check(arguments)
        except Exception as error:  # compilers and libraries raise their own types; an eager call repeats a real one
            if isinstance(error, KadrError) or is_fatal_cuda_error(error):
                raise
            failure, is_memory_short = f"{type(error).__name__}: {error}", _ran_out_of_memory(error)
        else:
            if graph is not None:
                self._graphs[shape] = graph
                self.replay_count += 1
            return output
        if is_memory_short:  # for now: the shape warms up and is captured again
            self.clear()
            self._warmed_up_shapes.remove(shape)
        else:
            self._failed_shapes.append(shape)
        warnings.warn(
            f"CUDA graph capture failed, so kernels are launched one by one: {failure}",
            KadrWarning,
            stacklevel=3,
        )
        return self.function(*arguments)

    def _capture_and_check(self, arguments: tuple[Any, ...]) -> tuple[CapturedGraph | None, Any]:
        """Returns a graph and the output of its first replay; None and the eager output where that is not finite.

        Raises:
            RuntimeError: the capture or the replay fails, or the replay differs from the eager call.
        """
        with use_token(None):  # a capture takes milliseconds, and must not end halfway
            graph = CapturedGraph(self.function, arguments, self._backend)
        output, expected = graph(arguments), graph.run_eagerly()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(expected)):
            return None, expected  # a comparison would say nothing about the graph
        if (mismatch := _mismatch(output, expected)) is not None:
            raise RuntimeError(mismatch)
        return graph, output


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether memory ran out; ending the failed capture may have raised another error on top of that."""
    return error is not None and (is_out_of_memory(error) or _ran_out_of_memory(error.__context__))


def _mismatch(replayed: Any, eager: Any) -> str | None:
    """Describes how the output of a replay differs from the eager one; None where they agree."""
    for output, expected in zip(tensors_in(replayed), tensors_in(eager), strict=True):
        error = float((output.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
        if not error <= GRAPH_MAX_RELATIVE_ERROR:
            return f"its results were {100 * error:.2g} % off"
    return None


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, in order."""
    leaves: list[Any] = []
    _map_leaves(leaves.append, value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _empty_like(arguments: tuple[Any, ...]) -> Any:
    """Returns the arguments with empty tensors, which can be written in and out of inference mode."""
    with torch.inference_mode(False):
        return _map_leaves(lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, arguments)


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies `function` to the leaves of nested tuples, named ones too."""
    if not isinstance(value, tuple):
        return function(value)
    mapped = [_map_leaves(function, item) for item in value]
    return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)


def _shape_key(leaf: Any) -> Hashable:
    """Returns what must be equal for a graph to be reused."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return ("slice", leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (type(leaf), leaf)


def _clone(outputs: Any) -> Any:
    return _map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)
