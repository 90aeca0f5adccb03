"""Engines of the catalogue: opened once, one without waiting for another, and the default one for good."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kadr.errors import CheckpointError
from kadr.pipeline.engine import Engine
from kadr.server.catalogue import MAX_OPEN_ENGINES, Catalogue
from kadr.spec.model_folders import NO_FOLDERS

DEFAULT: Mapping[str, Any] = {"model": "path of a", "loras": []}


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue({"a": "path of a", "b": "path of b"}, NO_FOLDERS)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models and LoRAs that were opened."""
    calls: list[Any] = []

    def open_engine(model: str, loras: list[str]) -> Any:
        calls.append((model, *loras))
        if model == "broken":
            raise CheckpointError("it is broken")
        return object()

    monkeypatch.setattr(Engine, "open", open_engine)
    return calls


def test_others_make_room_and_the_default_stays(catalogue: Catalogue, opened: list[Any]) -> None:
    default = catalogue.engine(DEFAULT)
    for number in range(3 * MAX_OPEN_ENGINES):
        catalogue.engine({"model": "path of b", "loras": [str(number)]})
    assert catalogue.engine({"loras": [], "model": "path of a"}) is default
    assert len(opened) == 1 + 3 * MAX_OPEN_ENGINES
    assert len(catalogue._slots) == MAX_OPEN_ENGINES
    catalogue.engine({"model": "path of b", "loras": ["0"]})
    assert opened[-1] == ("path of b", "0")


def test_engine_that_cannot_be_opened_is_tried_again(catalogue: Catalogue, opened: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError):
            catalogue.engine({"model": "broken", "loras": []})
    assert opened == [("broken",), ("broken",)]


def test_nobody_waits_for_an_engine_of_another(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, begun = threading.Event(), threading.Event()

    def open_engine(model: str, loras: list[str]) -> Any:
        if model == "slow":
            begun.set()
            assert slow.wait(10)
        return object()

    monkeypatch.setattr(Engine, "open", open_engine)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(catalogue.engine, {"model": "slow", "loras": []}) for _ in range(2)]
        assert begun.wait(10)
        catalogue.engine(DEFAULT)
        assert not any(item.done() for item in waiting)
        slow.set()
        assert waiting[0].result() is waiting[1].result()
