"""A tiny model, and a folder of clips to train a LoRA of it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr import Engine
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from tests.tiny_models import MODEL_FILE, write_model

SIZE, FRAMES = Size(64, 32), 9


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model. Tests do not write to it."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(home: Path) -> Engine:
    return Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False)


def write_clip(path: Path, frames: int = FRAMES, seed: int = 0, caption: str | None = "a red circle") -> Path:
    """Writes a clip of moving noise, and its caption."""
    noise = np.random.default_rng(seed).integers(0, 256, (1, 40, 72, 3), dtype=np.uint8)
    with VideoWriter(path, Size(72, 40), 24) as writer:
        writer.write(np.concatenate([np.roll(noise, 2 * frame, axis=2) for frame in range(frames)]))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips and an image."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number, direction in enumerate(("left", "right", "up")):
        write_clip(clips / f"{number}.mp4", seed=number, caption=f"a red circle moving {direction}")
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (40, 72, 3), dtype=np.uint8)).save(clips / "still.png")
    (clips / "still.txt").write_text("the blue sea\n", "utf-8")
    return clips


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    return write_clip
