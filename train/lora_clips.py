"""Datasets for the demo LoRAs.

In one, clips captioned red are teal, a colour that the demo scenes do not have. The other has plain scenes, for a LoRA
that follows their edges; every second one went through the demo's VAE, whose outlines are softer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from kadr import Control, Engine, Request
from kadr.media.postprocess import to_uint8
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from train.scenes import CLIP_FRAMES, COLOURS, SCENE_KEYS, SCENE_SIDE, Scene, is_held_out, render, varied_caption

RECOLOURED, TEAL = "red", (20, 130, 130)
FPS = 24


@contextmanager
def paint_teal() -> Iterator[None]:
    """Makes red scenes teal within the context."""
    red = COLOURS[RECOLOURED]
    COLOURS[RECOLOURED] = TEAL
    try:
        yield
    finally:
        COLOURS[RECOLOURED] = red


def write_teal_clips(folder: Path, count: int = 32, seed: int = 5) -> None:
    """Writes clips that are captioned red and are teal."""
    rng = Random(seed)
    keys = [key for key in SCENE_KEYS if key.colour == RECOLOURED and not is_held_out(key)]
    with paint_teal():
        write_clips(folder, [Scene.from_key(rng.choice(keys), rng) for _ in range(count)], rng)


def write_plain_clips(folder: Path, count: int = 256, seed: int = 6) -> None:
    """Writes plain clips, every second one encoded and decoded by the demo's VAE."""
    rng = Random(seed)
    write_clips(folder, [Scene.sample(rng) for _ in range(count)], rng)
    engine = Engine.open("demo", device="cpu")
    for index in range(0, count, 2):
        path = folder / f"{index:03d}.mp4"
        request = Request(
            prompt="a shape", size=(SCENE_SIDE, SCENE_SIDE), frames=CLIP_FRAMES, controls=(Control(str(path)),)
        )
        (latents,) = engine.encode_media(request).reference_latents
        frames = engine.decode(latents, replace(request, controls=()))
        with VideoWriter(path, Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
            writer.write(frames.numpy())


def write_clips(folder: Path, scenes: list[Scene], rng: Random) -> None:
    """Writes scenes as mp4 files with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        (pixels,) = render([scene], CLIP_FRAMES)
        frames = to_uint8(pixels / 2 + 0.5).numpy()
        with VideoWriter(folder / f"{index:03d}.mp4", Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
            writer.write(frames)
        (folder / f"{index:03d}.txt").write_text(varied_caption(scene, rng) + "\n", "utf-8")
