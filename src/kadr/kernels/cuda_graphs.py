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

BOUND = 0.01  # relative distance of a replay from the plain call, from which on it is not trusted
MOST = 4  # graphs that are kept: two passes, with and without disturbed blocks
SEEN = 64  # shapes that are remembered from their first call


class Backend(Protocol):
    """What records and replays."""

    def takes(self, device: torch.device) -> bool:
        """Whether it can record work on a device, now."""

    def warm(self, call: Callable[[], Any], device: torch.device) -> Any:
        """Run `call` where it will be recorded, so that libraries have set up what they set up once."""

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """Record `call` without running it: what runs it, and where its results will then be."""


class CudaGraphs:
    """CUDA's own. Graphs of a device run one at a time, so all share the memory for what comes up on the way."""

    def __init__(self) -> None:
        self._places: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}

    def takes(self, device: torch.device) -> bool:
        """See `Backend.takes`. While somebody records, nobody else can."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def warm(self, call: Callable[[], Any], device: torch.device) -> Any:
        """See `Backend.warm`."""
        with torch.cuda.device(device):
            stream, _ = self._place(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                made = call()
            torch.cuda.current_stream().wait_stream(stream)
        return made

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """See `Backend.record`. Other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream, pool = self._place(device)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                made = call()
        return graph.replay, made

    def _place(self, device: torch.device) -> tuple[torch.cuda.Stream, Any]:
        """The stream that is recorded on, and the memory."""
        if device not in self._places:
            self._places[device] = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        return self._places[device]


class Recorded:
    """One graph, with the places that it reads from and writes to.

    Attributes:
        plain: the same work on the same places, without the graph.
    """

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...], backend: Backend) -> None:
        own = _places(arguments)
        self._places = tensors_in(own)
        self._held: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(self._places)
        self._fill(tensors_in(arguments))
        self.plain = lambda: call(*own)
        self._replay, self._made = backend.record(self.plain, self._places[0].device)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        self._fill(tensors_in(arguments))
        self._replay()
        return _copied(self._made)  # the next replay writes to the same place

    def _fill(self, given: list[Tensor]) -> None:
        """Copy the inputs in, but for those that are there: most inputs of a step are those of the step before."""
        for index, (tensor, place) in enumerate(zip(given, self._places, strict=True)):
            if tensor.is_inference():  # does not tell when it changes
                place.copy_(tensor)
                continue
            held = self._held[index]
            if held is None or held[0]() is not tensor or held[1] != tensor._version:
                place.copy_(tensor)
                self._held[index] = weakref.ref(tensor), tensor._version


class Graphed:
    """A function of tensors that replays a CUDA graph where it has seen the shapes before.

    A shape is run as it is the first time, recorded the second, and replayed from then on: work that comes once pays
    nothing. The first run also settles what may not happen in a recording: kernels that are compiled or tried. The
    first replay is compared with a plain call before it is trusted.

    For the same shapes the function must do the same work: not look at numbers on the host, hold no state, and read
    what is no argument (weights) from memory that stays where it is. Off CUDA, and where a recording fails, it is
    called as it is; a failure is told as a warning.

    Args:
        call: takes tensors and tuples of them, on one device. Anything else among its arguments counts as part of the
            shape, and must be hashable. Returns a tensor or a tuple.
        most: graphs that are kept; the one that was longest not asked for goes first.
        backend: what records; None is CUDA.

    Attributes:
        replays: how many calls were replays.
    """

    def __init__(self, call: Callable[..., Any], *, most: int = MOST, backend: Backend | None = None) -> None:
        self.call, self.most, self.replays = call, most, 0
        self._backend: Backend = backend or CudaGraphs()
        self._graphs: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: deque[Hashable] = deque(maxlen=SEEN)
        self._hopeless: deque[Hashable] = deque(maxlen=SEEN)

    def __call__(self, *arguments: Any) -> Any:
        """As `call`. What comes back is the caller's own."""
        given = tensors_in(arguments)
        if not self._takes(given):
            return self.call(*arguments)
        shape = _mapped(_described, arguments)
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            self.replays += 1
            return self._graphs[shape](arguments)
        if shape in self._hopeless:
            return self.call(*arguments)
        if shape not in self._seen:
            self._seen.append(shape)
            return self._warm(arguments)
        return self._record(shape, arguments)

    def clear(self) -> None:
        """Drop all graphs, and with them the memory they hold: before weights move, for instance."""
        self._graphs.clear()

    def _takes(self, given: list[Tensor]) -> bool:
        devices = {tensor.device for tensor in given}
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        return len(devices) == 1 and not learning and self._backend.takes(devices.pop())

    def _warm(self, arguments: tuple[Any, ...]) -> Any:
        """Run on copies that lie as those of the recording will: kernels are compiled for strides and alignments."""
        own = _places(arguments)
        for place, tensor in zip(tensors_in(own), tensors_in(arguments), strict=True):
            place.copy_(tensor)
        return _copied(self._backend.warm(lambda: self.call(*own), tensors_in(own)[0].device))

    def _record(self, shape: Hashable, arguments: tuple[Any, ...]) -> Any:
        """Record, and give back what the first replay made if it is right."""
        while len(self._graphs) >= self.most:
            self._graphs.popitem(last=False)
        try:
            graph = Recorded(self.call, arguments, self._backend)
            made = graph(arguments)
            trouble = _fault(made, graph.plain())
        except RuntimeError as error:
            trouble = str(error)
        if trouble is None:
            self._graphs[shape] = graph
            self.replays += 1
            return made
        self._hopeless.append(shape)
        warnings.warn(
            f"no CUDA graph could be recorded, so the GPU is told each step by step: {trouble}",
            KadrWarning,
            stacklevel=3,
        )
        return self.call(*arguments)


def _fault(made: Any, right: Any) -> str | None:
    """What is wrong with the results of a replay; None where they are right."""
    for own, plain in zip(tensors_in(made), tensors_in(right), strict=True):
        error = float((own.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-30))
        if not error <= BOUND:
            return f"its results were {100 * error:.2g} % off"
    return None


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    found: list[Any] = []
    _mapped(found.append, value)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _places(arguments: tuple[Any, ...]) -> Any:
    """Room for the tensors among the arguments, between the other ones. To be written in and out of inference mode."""
    with torch.inference_mode(False):
        return _mapped(lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, arguments)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested tuples, named ones too, with everything else in them changed."""
    if not isinstance(value, tuple):
        return change(value)
    changed = [_mapped(change, item) for item in value]
    return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)


def _described(leaf: Any) -> Hashable:
    """What must be equal for a graph to serve."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return ("slice", leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (type(leaf), leaf)


def _copied(made: Any) -> Any:
    return _mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, made)
