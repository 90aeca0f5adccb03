"""Fixtures: a tiny model and its engine, which the tests of several rooms share, and a photo to show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from kadr import Condition, Engine
from tests.tiny_models import MODEL_FILE, write_model


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model. Nobody writes into it."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(home: Path) -> Engine:
    """One that encodes every prompt itself."""
    return Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False)


@pytest.fixture
def engine_without_weights(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that must not load a weight."""

    def take(name: str, load: Callable[[], nn.Module], **how: Any) -> Any:
        raise AssertionError(f"the {name} was loaded")

    monkeypatch.setattr(engine.components.module_cache, "acquire", take)
    return engine


@pytest.fixture(scope="session")
def image_condition(tmp_path_factory: pytest.TempPathFactory) -> Condition:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(path)
    return Condition(media=str(path))


@pytest.fixture
def output_folder(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
