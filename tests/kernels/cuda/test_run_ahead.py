"""The host waits for a GPU's layers only in work that can be cancelled, and only for large ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kadr.cancellation import cancellable
from kadr.errors import Cancelled
from kadr.kernels.cuda.run_ahead import MAX_LAYERS_AHEAD, MIN_LIMITED_NUMEL, limit_run_ahead


class FakeEvent:
    """An event of a GPU that is done when it is waited for."""

    waits: list[FakeEvent]

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        self.waits.append(self)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    """Events that were waited for."""
    FakeEvent.waits = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeEvent.waits


def layer_input(numel: int = MIN_LIMITED_NUMEL) -> Any:
    return SimpleNamespace(is_cuda=True, numel=lambda: numel, device="cuda")


def test_host_is_at_most_two_large_layers_ahead(waits: list[FakeEvent]) -> None:
    with cancellable():
        for index in range(10):
            limit_run_ahead(layer_input())
            assert len(waits) == max(0, index + 1 - MAX_LAYERS_AHEAD)


def test_small_layers_and_work_without_a_token_never_wait(waits: list[FakeEvent]) -> None:
    for _ in range(10):
        limit_run_ahead(layer_input())
    with cancellable():
        for _ in range(10):
            limit_run_ahead(layer_input(MIN_LIMITED_NUMEL - 1))
            limit_run_ahead(torch.zeros(1).expand(MIN_LIMITED_NUMEL))
    assert waits == []


def test_work_cancelled_while_the_host_waits_stops(waits: list[FakeEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    with cancellable() as token:
        monkeypatch.setattr(FakeEvent, "synchronize", lambda self: token.cancel())
        limit_run_ahead(layer_input())
        limit_run_ahead(layer_input())
        with pytest.raises(Cancelled):
            limit_run_ahead(layer_input())
