"""GraphedCallable captures, replays and drops graphs, shown with a fake backend on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels import mode
from kadr.kernels.cuda.graphs import CudaGraphBackend, GraphedCallable, tensors_in


class FakeBackend:
    """Replays by calling again and writing into the first outputs, as a graph would."""

    def __init__(self, *, fails: bool = False) -> None:
        self.warm_ups = self.captures = self.replays = 0
        self.fails = fails

    def can_capture(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def warm_up(self, call: Callable[[], Any], device: torch.device) -> Any:
        self.warm_ups += 1
        return call()

    def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        output = call()
        for tensor in tensors_in(output):
            tensor.fill_(torch.nan)  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():  # as a graph, it may write anywhere
                for static_output, tensor in zip(tensors_in(output), tensors_in(call()), strict=True):
                    static_output.copy_(tensor)

        return replay, output


class Table(NamedTuple):
    cosine: Tensor
    sine: Tensor


def scale_and_shift(x: Tensor, table: Table, factor: float = 1.0, bias: Tensor | None = None) -> Tensor:
    output = x * table.cosine * factor + table.sine
    return output if bias is None else output + bias


def inputs(rows: int = 3, seed: int = 0) -> tuple[Tensor, Table]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), Table(*torch.randn(2, 4, generator=generator))


def test_first_call_warms_up_second_captures_others_replay() -> None:
    fake = FakeBackend()
    graphed = GraphedCallable(scale_and_shift, backend=fake)
    counts = []
    for seed in range(4):
        arguments = inputs(seed=seed)
        assert torch.equal(graphed(*arguments), scale_and_shift(*arguments))
        counts.append((fake.warm_ups, fake.captures, fake.replays))
    assert counts == [(1, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)]
    assert graphed.replay_count == 3


def test_each_shape_dtype_and_constant_has_its_own_graph() -> None:
    fake = FakeBackend()
    graphed = GraphedCallable(scale_and_shift, backend=fake, max_graphs=9)
    x, table = inputs()
    argument_sets: list[tuple[Any, ...]] = [
        (x, table),
        inputs(5),
        (x.double(), table),
        (x, table, 2.0),
        (x, table, 1.0, x[0]),
    ]
    for _ in range(3):
        for arguments in argument_sets:
            assert torch.equal(graphed(*arguments), scale_and_shift(*arguments))
    assert (fake.warm_ups, fake.captures, fake.replays) == (5, 5, 10)


def test_a_slice_may_be_an_argument() -> None:
    fake = FakeBackend()
    graphed = GraphedCallable(lambda x, rows: x[rows] * 2, backend=fake)
    x = torch.arange(6.0)
    for rows in (slice(0, 2), slice(2, 6)) * 3:
        assert torch.equal(graphed(x, rows), x[rows] * 2)
    assert fake.captures == 2


def test_a_result_is_not_overwritten_by_the_next_replay() -> None:
    graphed = GraphedCallable(lambda x: (x + 1, x * 2), backend=FakeBackend())
    x = torch.arange(3.0)
    outputs = [graphed(x + step) for step in range(4)]
    for step, (sum_, product) in enumerate(outputs):
        assert torch.equal(sum_, x + step + 1)
        assert torch.equal(product, (x + step) * 2)


def test_a_result_may_be_the_next_input() -> None:
    graphed = GraphedCallable(lambda x: x * 2, backend=FakeBackend())
    x = torch.ones(2)
    for _ in range(5):
        x = graphed(x)
    assert torch.equal(x, torch.full((2,), 32.0))


def test_an_input_is_copied_again_only_after_an_in_place_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, copies = FakeBackend(), []
    graphed = GraphedCallable(scale_and_shift, backend=fake)
    x, table = inputs()
    graphed(x, table)
    graphed(x, table)
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, other: (copies.append(other), copy(self, other))[1])
    for step in range(3):
        assert torch.equal(graphed(x + step, table), scale_and_shift(x + step, table))
    assert not any(copied is tensor for copied in copies for tensor in table)
    table.sine.add_(1)
    assert torch.equal(graphed(x, table), scale_and_shift(x, table))
    assert sum(copied is table.sine for copied in copies) == 1


def test_inference_mode_inputs_are_always_copied() -> None:
    graphed = GraphedCallable(lambda x: x * 2, backend=FakeBackend())
    with torch.inference_mode():
        x = torch.ones(3)
        for value in range(5):
            x.fill_(value)
            assert torch.equal(graphed(x), torch.full((3,), 2.0 * value))
    assert torch.equal(graphed(torch.ones(3)), torch.full((3,), 2.0))


def test_warm_up_inputs_have_the_strides_of_the_capture() -> None:
    strides = []
    graphed = GraphedCallable(lambda x: strides.append((x.stride(), x.data_ptr() % 64)) or x * 2, backend=FakeBackend())
    whole = torch.arange(40.0).view(4, 10)
    for _ in range(3):
        assert torch.equal(graphed(whole[:, 1:6]), whole[:, 1:6] * 2)
    assert set(strides) == {((5, 1), 0)}


def test_the_least_recently_used_graph_is_evicted() -> None:
    fake = FakeBackend()
    graphed = GraphedCallable(scale_and_shift, backend=fake, max_graphs=2)
    for rows in (1, 1, 2, 2, 1, 3, 3):  # the third shape evicts the second
        graphed(*inputs(rows))
    assert fake.captures == 3
    graphed(*inputs(1))
    assert fake.captures == 3
    graphed(*inputs(2))
    assert fake.captures == 4
    graphed.clear()
    arguments = inputs(2, seed=7)
    assert torch.equal(graphed(*arguments), scale_and_shift(*arguments))
    assert fake.captures == 5


def test_a_wrong_replay_warns_and_is_not_used() -> None:
    class WrongBackend(FakeBackend):
        def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
            _, output = super().capture(call, device)
            return lambda: output.fill_(1.0), output

    graphed = GraphedCallable(scale_and_shift, backend=WrongBackend())
    graphed(*inputs(seed=0))
    with pytest.warns(KadrWarning, match=r"its results were .* % off"):
        assert torch.equal(graphed(*inputs(seed=1)), scale_and_shift(*inputs(seed=1)))
    assert torch.equal(graphed(*inputs(seed=2)), scale_and_shift(*inputs(seed=2)))
    assert graphed.replay_count == 0


def test_a_failed_capture_warns_once_and_calls_the_function() -> None:
    fake = FakeBackend(fails=True)
    graphed = GraphedCallable(scale_and_shift, backend=fake)
    graphed(*inputs())
    with pytest.warns(KadrWarning, match="not permitted when stream is capturing"):
        assert torch.equal(graphed(*inputs()), scale_and_shift(*inputs()))
    assert torch.equal(graphed(*inputs()), scale_and_shift(*inputs()))
    assert graphed.replay_count == 0


class FailingBackend(FakeBackend):
    """Fails the first captures with these errors."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__()
        self.errors = list(errors)

    def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.errors:
            try:
                raise self.errors.pop(0)
            finally:
                if self.errors and self.errors[0].args == ("at the end of the capture",):
                    raise self.errors.pop(0)
        return super().capture(call, device)


@pytest.mark.parametrize(
    "errors",
    [
        (torch.OutOfMemoryError("CUDA out of memory"),),
        (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("at the end of the capture")),
    ],
    ids=["plain", "hidden"],
)
def test_memory_that_ran_out_once_does_not_rule_graphs_out(errors: tuple[BaseException, ...]) -> None:
    fake = FailingBackend(*errors)
    graphed = GraphedCallable(scale_and_shift, backend=fake)
    graphed(*inputs(2))
    graphed(*inputs())
    with pytest.warns(KadrWarning, match="capture failed"):
        assert torch.equal(graphed(*inputs()), scale_and_shift(*inputs()))
    for _ in range(3):
        assert torch.equal(graphed(*inputs()), scale_and_shift(*inputs()))
    assert graphed.replay_count == 2


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), KeyboardInterrupt()])
def test_an_error_that_says_nothing_about_a_graph_is_raised(error: BaseException) -> None:
    graphed = GraphedCallable(scale_and_shift, backend=FailingBackend(error))
    graphed(*inputs())
    with pytest.raises(type(error)):
        graphed(*inputs())


@pytest.mark.parametrize("error", [ValueError("no such block size"), AssertionError("in a compiler"), KeyError("x")])
def test_any_error_of_a_library_during_a_capture_leaves_the_eager_call(error: Exception) -> None:
    graphed = GraphedCallable(scale_and_shift, backend=FailingBackend(error))
    graphed(*inputs())
    with pytest.warns(KadrWarning, match=f"capture failed.*{type(error).__name__}"):
        assert torch.equal(graphed(*inputs()), scale_and_shift(*inputs()))
    assert torch.equal(graphed(*inputs()), scale_and_shift(*inputs()))
    assert graphed.replay_count == 0


def test_an_error_of_the_function_itself_is_raised() -> None:
    def fails(x: Tensor) -> Tensor:
        if len(calls) > 1:
            raise KeyError("a bug")
        calls.append(x)
        return x

    calls: list[Tensor] = []
    graphed = GraphedCallable(fails, backend=FakeBackend())
    graphed(torch.ones(2))
    calls.append(torch.ones(2))
    with pytest.warns(KadrWarning, match="capture failed"), pytest.raises(KeyError, match="a bug"):
        graphed(torch.ones(2))


def test_a_failed_capture_leaves_the_stream_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own context is used; only CUDA below it is faked."""
    streams = ["default"]

    class StreamContext:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.previous, streams[0] = streams[0], self.stream

        def __exit__(self, *error: object) -> None:
            streams[0] = self.previous

    class Graph:
        replay = None

        def capture_begin(self, *arguments: Any, **options: Any) -> None:
            assert streams[0] == "capture"

        def capture_end(self) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda: "capture",
        "graph_pool_handle": lambda: 0,
        "stream": StreamContext,
        "device": lambda device: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaGraphBackend().capture(lambda: 1 / 0, torch.device("cuda", 0))
    assert streams == ["default"]


def test_outputs_that_are_not_finite_give_no_verdict() -> None:
    graphed = GraphedCallable(scale_and_shift, backend=FakeBackend())
    x, table = inputs()
    graphed(x, table)
    assert graphed(x * torch.nan, table).isnan().all()
    assert graphed.replay_count == 0
    assert torch.equal(graphed(x, table), scale_and_shift(x, table))
    assert graphed.replay_count == 1


def test_a_graph_of_one_kernel_mode_is_not_replayed_in_another() -> None:
    modes: list[str] = []
    graphed = GraphedCallable(lambda x: modes.append(mode.current()) or x * 2, backend=FakeBackend())
    for _ in range(3):
        graphed(torch.ones(2))
    with mode.override(mode.REFERENCE):
        graphed(torch.ones(2))
    assert modes[-1] == mode.REFERENCE


@pytest.mark.parametrize("backend", [None, CudaGraphBackend()])
def test_without_cuda_the_function_is_called_directly(backend: CudaGraphBackend | None) -> None:
    calls = []
    graphed = GraphedCallable(lambda x: calls.append(x) or x, backend=backend)
    x = torch.ones(2)
    for _ in range(3):
        assert graphed(x) is x
    assert len(calls) == 3


def test_inputs_with_gradients_or_no_tensors_are_not_captured() -> None:
    fake = FakeBackend()
    graphed = GraphedCallable(lambda x: x * 2, backend=fake)
    for _ in range(3):
        assert graphed(3) == 6
        assert graphed(torch.ones(2, requires_grad=True)).requires_grad
    assert (fake.warm_ups, fake.captures) == (0, 0)
