"""How well the demo model does what it is told: `python -m train.evaluate`. Prints one JSON object.

Captions come from combinations that training never saw; what the videos show is measured by `train.judge`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kadr import Condition, Engine, Request
from train.judge import judge
from train.shapes import Scene, held_out_captions, plain_caption, render

PROPERTIES = ("colour", "shape", "background", "motion")


def obeyed(engine: Engine, captions: Sequence[tuple[str, Scene]], *, guidance: float | None = None) -> dict[str, float]:
    """The share of videos that show what their caption says, by property."""
    right = dict.fromkeys(PROPERTIES, 0)
    for seed, (caption, scene) in enumerate(captions):
        video = engine.generate(Request(prompt=caption, seed=seed, guidance=guidance))
        for name, seen, told in zip(PROPERTIES, judge(video.frames), scene.key, strict=True):
            right[name] += seen == told
    return {name: count / len(captions) for name, count in right.items()}


def kept(engine: Engine, captions: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Image-to-video: how well the first frame is kept, in dB against the VAE's own round trip, and the motion."""
    kept_db, moved = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.png"
            Image.fromarray(picture(scene)).save(path)
            request = Request(prompt=plain_caption(scene), seed=seed, conditions=(Condition(media=str(path)),))
            video = engine.generate(request)
            kept_db.append(psnr(video.frames[0], round_trip(engine, path)))
            moved += judge(video.frames).motion == scene.motion
    return {"psnr_mean": float(np.mean(kept_db)), "psnr_least": min(kept_db), "motion": moved / len(captions)}


def picture(scene: Scene) -> np.ndarray:
    """The first frame of a scene, uint8 (H, W, 3)."""
    pixels = render([scene], 1)[0, :, 0]
    return ((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def round_trip(engine: Engine, path: Path) -> np.ndarray:
    """The picture as the VAE alone gives it back, uint8 (H, W, 3)."""
    request = Request(prompt="-", frames=1, conditions=(Condition(media=str(path)),))
    return engine.decode(engine.encode(request), request).numpy()[0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--captions", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=2026)
    chosen = parser.parse_args()
    engine = Engine.open(chosen.model)
    captions = held_out_captions(chosen.captions, chosen.seed)
    pictures = held_out_captions(chosen.pictures, chosen.seed + 1)
    report = {
        "text": obeyed(engine, captions),
        "text without guidance": obeyed(engine, captions, guidance=1.0),
        "image": kept(engine, pictures),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
