"""CUDA graphs: what a GPU was told to do is recorded once for each shape of the inputs, and then told again as a whole.

A layer is dozens of launches of a few microseconds each on the host's side. Where the GPU needs less for them, as with
fewer than about a thousand tokens, it waits for the host; a graph is one launch.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from kadr.errors import KadrWarning

GRAPH_MAX_RELATIVE_ERROR = 0.01  # relative distance of a replay from the plain call, from which on it is not trusted
MAX_GRAPHS = 4  # graphs that are kept: two passes, with and without disturbed blocks
MAX_TRACKED_SHAPES = 64  # shapes that are remembered from their first call


class GraphBackend(Protocol):
    """What records and replays."""

    def can_capture(self, device: torch.device) -> bool:
        """Whether it can record work on a device, now."""

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        """Run `function` where it will be recorded, so that libraries have set up what they set up once."""

    def capture(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Record `function` without running it: what runs it, and where its results will then be."""


class CudaGraphBackend:
    """CUDA's own. Graphs of a device run one at a time, so all share the memory for what comes up on the way."""

    def __init__(self) -> None:
        self._streams_and_pools: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}

    def can_capture(self, device: torch.device) -> bool:
        """See `GraphBackend.can_capture`. While somebody records, nobody else can."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> Any:
        """See `GraphBackend.warm_up`."""
        with torch.cuda.device(device):
            stream, _ = self._stream_and_pool(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                made = function()
            torch.cuda.current_stream().wait_stream(stream)
        return made

    def capture(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """See `GraphBackend.capture`. Other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream, pool = self._stream_and_pool(device)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                made = function()
        return graph.replay, made

    def _stream_and_pool(self, device: torch.device) -> tuple[torch.cuda.Stream, Any]:
        """The stream that is recorded on, and the memory."""
        if device not in self._streams_and_pools:
            self._streams_and_pools[device] = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        return self._streams_and_pools[device]


class CapturedGraph:
    """One graph, with the places that it reads from and writes to.

    Attributes:
        run_eagerly: the same work on the same places, without the graph.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], backend: GraphBackend) -> None:
        own = _empty_like(arguments)
        self._static_inputs = tensors_in(own)
        self._copied_versions: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(self._static_inputs)
        self._copy_inputs(tensors_in(arguments))
        self.run_eagerly = lambda: function(*own)
        self._replay, self._static_output = backend.capture(self.run_eagerly, self._static_inputs[0].device)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        self._copy_inputs(tensors_in(arguments))
        self._replay()
        return _clone(self._static_output)  # the next replay writes to the same place

    def _copy_inputs(self, inputs: list[Tensor]) -> None:
        """Copy the inputs in, but for those that are there: most inputs of a step are those of the step before."""
        for index, (tensor, place) in enumerate(zip(inputs, self._static_inputs, strict=True)):
            if tensor.is_inference():  # does not tell when it changes
                place.copy_(tensor)
                continue
            held = self._copied_versions[index]
            if held is None or held[0]() is not tensor or held[1] != tensor._version:
                place.copy_(tensor)
                self._copied_versions[index] = weakref.ref(tensor), tensor._version


class GraphedCallable:
    """A function of tensors that replays a CUDA graph where it has seen the shapes before.

    A shape is run as it is the first time, recorded the second, and replayed from then on: work that comes once pays
    nothing. The first run also settles what may not happen in a recording: kernels that are compiled or tried. The
    first replay is compared with a plain call before it is trusted.

    For the same shapes the function must do the same work: not look at numbers on the host, hold no state, and read
    what is no argument (weights) from memory that stays where it is. Off CUDA, and where a recording fails, it is
    called as it is; a failure is told as a warning.

    Args:
        function: takes tensors and tuples of them, on one device. Anything else among its arguments counts as part of the
            shape, and must be hashable. Returns a tensor or a tuple.
        max_graphs: graphs that are kept; the one that was longest not asked for goes first.
        backend: what records; None is CUDA.

    Attributes:
        replay_count: how many calls were replays.
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
        """As `call`. What comes back is the caller's own."""
        given = tensors_in(arguments)
        if not self._can_capture(given):
            return self.function(*arguments)
        shape = _map_leaves(_shape_key, arguments)
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            self.replay_count += 1
            return self._graphs[shape](arguments)
        if shape in self._failed_shapes:
            return self.function(*arguments)
        if shape not in self._warmed_up_shapes:
            self._warmed_up_shapes.append(shape)
            return self._warm_up(arguments)
        return self._capture_and_replay(shape, arguments)

    def clear(self) -> None:
        """Drop all graphs, and with them the memory they hold: before weights move, for instance."""
        self._graphs.clear()

    def _can_capture(self, tensors: list[Tensor]) -> bool:
        devices = {tensor.device for tensor in tensors}
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return len(devices) == 1 and not learning and self._backend.can_capture(devices.pop())

    def _warm_up(self, arguments: tuple[Any, ...]) -> Any:
        """Run on copies that lie as those of the recording will: kernels are compiled for strides and alignments."""
        own = _empty_like(arguments)
        for place, tensor in zip(tensors_in(own), tensors_in(arguments), strict=True):
            place.copy_(tensor)
        return _clone(self._backend.warm_up(lambda: self.function(*own), tensors_in(own)[0].device))

    def _capture_and_replay(self, shape: Hashable, arguments: tuple[Any, ...]) -> Any:
        """Record, and give back what the first replay made if it is right."""
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        try:
            graph = CapturedGraph(self.function, arguments, self._backend)
            made = graph(arguments)
            trouble = _mismatch(made, graph.run_eagerly())
        except RuntimeError as error:
            trouble = str(error)
        if trouble is None:
            self._graphs[shape] = graph
            self.replay_count += 1
            return made
        self._failed_shapes.append(shape)
        warnings.warn(
            f"no CUDA graph could be recorded, so the GPU is told each step by step: {trouble}",
            KadrWarning,
            stacklevel=3,
        )
        return self.function(*arguments)


def _mismatch(replayed: Any, eager: Any) -> str | None:
    """What is wrong with the results of a replay; None where they are right."""
    for own, plain in zip(tensors_in(replayed), tensors_in(eager), strict=True):
        error = float((own.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-30))
        if not error <= GRAPH_MAX_RELATIVE_ERROR:
            return f"its results were {100 * error:.2g} % off"
    return None


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    found: list[Any] = []
    _map_leaves(found.append, value)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _empty_like(arguments: tuple[Any, ...]) -> Any:
    """Room for the tensors among the arguments, between the other ones. To be written in and out of inference mode."""
    with torch.inference_mode(False):
        return _map_leaves(lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, arguments)


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested tuples, named ones too, with everything else in them changed."""
    if not isinstance(value, tuple):
        return function(value)
    changed = [_map_leaves(function, item) for item in value]
    return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)


def _shape_key(leaf: Any) -> Hashable:
    """What must be equal for a graph to serve."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return ("slice", leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (type(leaf), leaf)


def _clone(outputs: Any) -> Any:
    return _map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)
