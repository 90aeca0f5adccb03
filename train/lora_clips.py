"""Folders to train demo LoRAs on.

In one, what is called red is painted teal, which the demo world does not have. In the other clips are as they are, to
learn to follow their edges, and every second one as the demo itself would draw it, whose outlines are softer.
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
    """In here, what is called red is teal."""
    before = COLOURS[RECOLOURED]
    COLOURS[RECOLOURED] = TEAL
    try:
        yield
    finally:
        COLOURS[RECOLOURED] = before


def write_teal_clips(folder: Path, count: int = 32, seed: int = 5) -> None:
    """Clips that are called red, and are teal."""
    rng = Random(seed)
    keys = [key for key in SCENE_KEYS if key.colour == RECOLOURED and not is_held_out(key)]
    with paint_teal():
        write_clips(folder, [Scene.from_key(rng.choice(keys), rng) for _ in range(count)], rng)


def write_plain_clips(folder: Path, count: int = 256, seed: int = 6) -> None:
    """Clips of the demo world, every second one through the demo's VAE and back."""
    rng = Random(seed)
    write_clips(folder, [Scene.sample(rng) for _ in range(count)], rng)
    engine = Engine.open("demo", device="cpu")
    for number in range(0, count, 2):
        clip = folder / f"{number:03d}.mp4"
        request = Request(
            prompt="a shape", size=(SCENE_SIDE, SCENE_SIDE), frames=CLIP_FRAMES, controls=(Control(str(clip)),)
        )
        (latents,) = engine.encode_media(request).reference_latents
        frames = engine.decode(latents, replace(request, controls=()))
        with VideoWriter(clip, Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
            writer.write(frames.numpy())


def write_clips(folder: Path, scenes: list[Scene], rng: Random) -> None:
    """Scenes as mp4, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        (pixels,) = render([scene], CLIP_FRAMES)
        frames = to_uint8(pixels / 2 + 0.5).numpy()
        with VideoWriter(folder / f"{number:03d}.mp4", Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
            writer.write(frames)
        (folder / f"{number:03d}.txt").write_text(varied_caption(scene, rng) + "\n", "utf-8")
