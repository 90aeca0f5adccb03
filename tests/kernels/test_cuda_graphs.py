"""What is recorded, replayed and dropped, with a backend that notes it on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels.cuda_graphs import CudaGraphBackend, GraphedCallable, tensors_in


class Notes:
    """Replays by calling again and writing into the places of the first results, as a graph would."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.warmed = self.recorded = self.replayed = 0
        self.refuses = refuses

    def can_capture(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def warm_up(self, call: Callable[[], Any], device: torch.device) -> Any:
        self.warmed += 1
        return call()

    def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        made = call()
        for tensor in tensors_in(made):
            tensor.fill_(torch.nan)  # recording computes nothing

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode():  # as a graph, it may write anywhere
                for place, tensor in zip(tensors_in(made), tensors_in(call()), strict=True):
                    place.copy_(tensor)

        return replay, made


class Table(NamedTuple):
    cosine: Tensor
    sine: Tensor


def turned(x: Tensor, table: Table, by: float = 1.0, bias: Tensor | None = None) -> Tensor:
    made = x * table.cosine * by + table.sine
    return made if bias is None else made + bias


def inputs(rows: int = 3, seed: int = 0) -> tuple[Tensor, Table]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), Table(*torch.randn(2, 4, generator=generator))


def test_the_first_call_warms_the_second_records_and_all_others_replay() -> None:
    notes = Notes()
    graphed = GraphedCallable(turned, backend=notes)
    counts = []
    for seed in range(4):
        given = inputs(seed=seed)
        assert torch.equal(graphed(*given), turned(*given))
        counts.append((notes.warmed, notes.recorded, notes.replayed))
    assert counts == [(1, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)]
    assert graphed.replay_count == 3


def test_each_shape_dtype_and_constant_has_a_graph_of_its_own() -> None:
    notes = Notes()
    graphed = GraphedCallable(turned, backend=notes, max_graphs=9)
    x, table = inputs()
    kinds: list[tuple[Any, ...]] = [(x, table), inputs(5), (x.double(), table), (x, table, 2.0), (x, table, 1.0, x[0])]
    for _ in range(3):
        for given in kinds:
            assert torch.equal(graphed(*given), turned(*given))
    assert (notes.warmed, notes.recorded, notes.replayed) == (5, 5, 10)


def test_a_slice_may_be_an_argument() -> None:
    notes = Notes()
    graphed = GraphedCallable(lambda x, rows: x[rows] * 2, backend=notes)
    x = torch.arange(6.0)
    for rows in (slice(0, 2), slice(2, 6)) * 3:
        assert torch.equal(graphed(x, rows), x[rows] * 2)
    assert notes.recorded == 2


def test_what_came_back_is_not_overwritten_by_the_next_replay() -> None:
    graphed = GraphedCallable(lambda x: (x + 1, x * 2), backend=Notes())
    x = torch.arange(3.0)
    made = [graphed(x + step) for step in range(4)]
    for step, (sum_, product) in enumerate(made):
        assert torch.equal(sum_, x + step + 1)
        assert torch.equal(product, (x + step) * 2)


def test_a_result_may_be_the_next_input() -> None:
    graphed = GraphedCallable(lambda x: x * 2, backend=Notes())
    x = torch.ones(2)
    for _ in range(5):
        x = graphed(x)
    assert torch.equal(x, torch.full((2,), 32.0))


def test_an_input_that_stays_is_copied_once_and_one_that_changes_in_place_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes, copies = Notes(), []
    graphed = GraphedCallable(turned, backend=notes)
    x, table = inputs()
    graphed(x, table)
    graphed(x, table)
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, other: (copies.append(other), copy(self, other))[1])
    for step in range(3):
        assert torch.equal(graphed(x + step, table), turned(x + step, table))
    assert not any(one is part for one in copies for part in table)
    table.sine.add_(1)
    assert torch.equal(graphed(x, table), turned(x, table))
    assert sum(one is table.sine for one in copies) == 1


def test_inputs_of_inference_mode_are_always_copied() -> None:
    graphed = GraphedCallable(lambda x: x * 2, backend=Notes())
    with torch.inference_mode():
        x = torch.ones(3)
        for value in range(5):
            x.fill_(value)
            assert torch.equal(graphed(x), torch.full((3,), 2.0 * value))
    assert torch.equal(graphed(torch.ones(3)), torch.full((3,), 2.0))


def test_the_first_call_runs_on_tensors_that_lie_as_those_of_the_recording() -> None:
    strides = []
    graphed = GraphedCallable(lambda x: strides.append((x.stride(), x.data_ptr() % 64)) or x * 2, backend=Notes())
    whole = torch.arange(40.0).view(4, 10)
    for _ in range(3):
        assert torch.equal(graphed(whole[:, 1:6]), whole[:, 1:6] * 2)
    assert set(strides) == {((5, 1), 0)}


def test_the_graph_that_was_longest_not_used_goes_first() -> None:
    notes = Notes()
    graphed = GraphedCallable(turned, backend=notes, max_graphs=2)
    for rows in (1, 1, 2, 2, 1, 3, 3):  # the third takes the place of the second
        graphed(*inputs(rows))
    assert notes.recorded == 3
    graphed(*inputs(1))
    assert notes.recorded == 3
    graphed(*inputs(2))
    assert notes.recorded == 4
    graphed.clear()
    given = inputs(2, seed=7)
    assert torch.equal(graphed(*given), turned(*given))
    assert notes.recorded == 5


def test_a_replay_that_is_wrong_is_not_trusted() -> None:
    class Wrong(Notes):
        def capture(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
            _, made = super().capture(call, device)
            return lambda: made.fill_(1.0), made

    graphed = GraphedCallable(turned, backend=Wrong())
    graphed(*inputs(seed=0))
    with pytest.warns(KadrWarning, match=r"its results were .* % off"):
        assert torch.equal(graphed(*inputs(seed=1)), turned(*inputs(seed=1)))
    assert torch.equal(graphed(*inputs(seed=2)), turned(*inputs(seed=2)))
    assert graphed.replay_count == 0


def test_where_recording_fails_it_is_called_as_it_is_and_told_once() -> None:
    notes = Notes(refuses=True)
    graphed = GraphedCallable(turned, backend=notes)
    graphed(*inputs())
    with pytest.warns(KadrWarning, match="not permitted when stream is capturing"):
        assert torch.equal(graphed(*inputs()), turned(*inputs()))
    assert torch.equal(graphed(*inputs()), turned(*inputs()))
    assert graphed.replay_count == 0


@pytest.mark.parametrize("backend", [None, CudaGraphBackend()])
def test_without_cuda_it_is_called_as_it_is(backend: CudaGraphBackend | None) -> None:
    calls = []
    graphed = GraphedCallable(lambda x: calls.append(x) or x, backend=backend)
    x = torch.ones(2)
    for _ in range(3):
        assert graphed(x) is x
    assert len(calls) == 3


def test_what_is_learned_from_or_has_no_tensors_is_called_as_it_is() -> None:
    notes = Notes()
    graphed = GraphedCallable(lambda x: x * 2, backend=notes)
    for _ in range(3):
        assert graphed(3) == 6
        assert graphed(torch.ones(2, requires_grad=True)).requires_grad
    assert (notes.warmed, notes.recorded) == (0, 0)
