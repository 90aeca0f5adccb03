"""Fixtures that several test folders share: a tiny model, its engine, and an image as a condition."""

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
    """Folder of a tiny model. Tests do not write into it."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(home: Path) -> Engine:
    """Engine of the tiny model, without a prompt cache."""
    return Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False)


@pytest.fixture
def engine_without_weights(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Engine that must not load a weight."""

    def refuse(name: str, load: Callable[[], nn.Module], **options: Any) -> Any:
        raise AssertionError(f"the {name} was loaded")

    monkeypatch.setattr(engine._model.module_cache, "acquire", refuse)
    return engine


@pytest.fixture(scope="session")
def image_condition(tmp_path_factory: pytest.TempPathFactory) -> Condition:
    """Condition on an image of noise, 90x40, at frame 0."""
    path = tmp_path_factory.mktemp("image") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 84, 3), dtype=np.uint8)).save(path)
    return Condition(media=str(path))


@pytest.fixture
def output_folder(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
