"""What a LoRA of the demo learns, on a CPU, in minutes: `python -m benchmarks.lora teal` or `measure_edges`.

teal: 32 clips whose captions say red, and which are painted teal, a colour outside the demo's world. How far the
shape's colour went from red to teal is measured at strengths 0, 0.5 and 1, with prompts and seeds that were not
trained.

edges: clips of the demo's world, and their edges as references. How well the outlines of what is made lie on those of
the clip whose edges were given is measured with the control and without, over scenes that were not trained.

Trains by `kadr train-lora` where the LoRA is not there yet; writes benchmarks/results/lora-demo-NAME.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from kadr import Control, Engine, KadrWarning, Request
from kadr.bench.machine import describe_machine
from kadr.media.clip import read_video
from train.judge import border_pixels, smooth
from train.lora_clips import RECOLOURED, TEAL, write_clips, write_plain_clips, write_teal_clips
from train.scenes import BACKGROUNDS, CLIP_FRAMES, COLOURS, MOTIONS, SCENE_SIDE, SHAPES, Scene, SceneKey, plain_caption

RESULTS = Path(__file__).parent / "results"
STRENGTHS = (0.0, 0.5, 1.0)
OUTLINE_MARGIN = 3  # pixels within which two outlines lie on each other
TRAINING_FLAGS = {
    "teal": "--rank 8 --steps 300 --batch-size 8 --learning-rate 0.002 --sigma-sampling uniform --validate-every 50",
    "edges": (
        "--rank 16 --target-modules attention+feed-forward --steps 1600 --batch-size 8 --learning-rate 0.002 --sigma-sampling uniform "
        "--references canny --first-frame-conditioning-p 0 --validate-every 200"
    ),
}
CLIP_WRITERS = {
    "teal": lambda folder: write_teal_clips(folder, 32),
    "edges": lambda folder: write_plain_clips(folder, 384),
}
VIDEO_SETTINGS = {"size": (SCENE_SIDE, SCENE_SIDE), "frames": CLIP_FRAMES}


def train_lora(name: str, work_folder: Path) -> tuple[Path, float]:
    """The LoRA, and the seconds that its updates took."""
    output, clips = work_folder / f"{name}.safetensors", work_folder / "clips"
    if not clips.exists():
        CLIP_WRITERS[name](clips)
    if not output.exists():
        words = ["train-lora", str(clips), "--output", str(output), *TRAINING_FLAGS[name].split()]
        subprocess.run([sys.executable, "-m", "kadr", *words], check=True)
    with (work_folder / f"{name}.training" / "log.csv").open() as file:
        return output, float([row["seconds"] for row in csv.DictReader(file)][-1])


# Colour


def shape_colour(frames: np.ndarray) -> np.ndarray:
    """The colour of the shape: of the pixels that are farthest from the background."""
    pixels = smooth(frames[::4].astype(np.float32))
    distance = np.linalg.norm(pixels - np.median(border_pixels(pixels, 4), axis=0), axis=-1)
    return np.median(pixels[distance > 0.8 * np.percentile(distance, 99.5)], axis=0)


def teal_share(colour: np.ndarray) -> float:
    """0 is red, 1 is teal, on the line between them."""
    red, teal = np.array(COLOURS[RECOLOURED], float), np.array(TEAL, float)
    return float((colour - red) @ (teal - red) / ((teal - red) @ (teal - red)))


def measure_teal(lora: Path, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Shares of the way at each strength, and a sheet of middle frames."""
    engine, plain = Engine.open("demo", loras=[lora]), Engine.open("demo")
    rng = Random(77)
    keys = [
        SceneKey(RECOLOURED, rng.choice(list(SHAPES)), rng.choice(list(BACKGROUNDS)), rng.choice(MOTIONS))
        for _ in range(count)
    ]
    shares: dict[float, list[float]] = {strength: [] for strength in STRENGTHS}
    others, same, rows = [], [], []
    for number, key in enumerate(keys):
        prompt = plain_caption(Scene.from_key(key, rng))
        made = {}
        for strength in STRENGTHS:
            request = Request(prompt=prompt, seed=1000 + number, lora_strengths=(strength,), **VIDEO_SETTINGS)
            made[strength] = engine.generate(request).frames
            shares[strength].append(teal_share(shape_colour(made[strength])))
        without = plain.generate(Request(prompt=prompt, seed=1000 + number, **VIDEO_SETTINGS)).frames
        same.append(bool((made[0.0] == without).all()))
        blue = Request(prompt=prompt.replace(RECOLOURED, "blue"), seed=1000 + number, **VIDEO_SETTINGS)
        apart = shape_colour(engine.generate(blue).frames) - shape_colour(plain.generate(blue).frames)
        others.append(float(np.linalg.norm(apart)))
        rows.append(np.concatenate([frames[CLIP_FRAMES // 2] for frames in made.values()], axis=1))
    told = {
        "videos": count,
        "from_red_to_teal": {
            str(strength): {"median": round(median(each), 3), "least": round(min(each), 3), "most": round(max(each), 3)}
            for strength, each in shares.items()
        },
        "frames_at_0_are_those_without": all(same),
        "what_is_called_blue_moves_by": round(median(others), 1),
    }
    return told, np.concatenate(rows[:6])


# Outlines


def silhouette(frames: np.ndarray) -> np.ndarray:
    """Where the shape is, bool (F, H, W)."""
    pixels = smooth(frames.astype(np.float32))
    distance = np.linalg.norm(pixels - np.median(border_pixels(pixels, 4), axis=0), axis=-1)
    return distance > 0.5 * np.percentile(distance, 99.5)


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a shape that touch what is not shape, uint8 (H, W)."""
    own = mask.astype(np.uint8)
    return own - cv2.erode(own, np.ones((3, 3), np.uint8))


def outline_overlap(frames: np.ndarray, reference_frames: np.ndarray) -> float:
    """How well outlines lie on each other, frame by frame: the harmonic mean of the shares of each within `OUTLINE_MARGIN` pixels
    of the other. 0 where one shows nothing."""
    reach = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * OUTLINE_MARGIN + 1, 2 * OUTLINE_MARGIN + 1))
    scores = []
    for ours, theirs in zip(map(outline, silhouette(frames)), map(outline, silhouette(reference_frames)), strict=True):
        found = [ours[cv2.dilate(theirs, reach) > 0].sum(), theirs[cv2.dilate(ours, reach) > 0].sum()]
        shares = [part / max(whole.sum(), 1) for part, whole in zip(found, (ours, theirs), strict=True)]
        scores.append(2 * shares[0] * shares[1] / max(sum(shares), 1e-9))
    return float(mean(scores))


def measure_edges(lora: Path, count: int, work_folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Overlap of outlines with the control and without, and a sheet of middle frames."""
    engine, rng = Engine.open("demo", loras=[lora]), Random(99)
    scenes = [Scene.sample(rng, held_out=True) for _ in range(count)]
    folder = work_folder / "held-out"
    if not folder.exists():
        write_clips(folder, scenes, rng)
    scores: dict[str, list[float]] = {"with": [], "without": [], "without_lora": []}
    rows = []
    plain = Engine.open("demo")
    for number, scene in enumerate(scenes):
        clip = folder / f"{number:03d}.mp4"
        right = read_video(clip).frames
        request = {"prompt": plain_caption(scene), "seed": 2000 + number, **VIDEO_SETTINGS}
        led = engine.generate(Request(controls=(Control(str(clip), kind="canny"),), **request)).frames
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KadrWarning)  # it has no control, and is not to have one
            free = engine.generate(Request(**request)).frames
        bare = plain.generate(Request(**request)).frames
        for name, frames in (("with", led), ("without", free), ("without_lora", bare)):
            scores[name].append(outline_overlap(frames, right))
        rows.append(np.concatenate([each[CLIP_FRAMES // 2] for each in (right, led, free)], axis=1))
    told = {
        "videos": count,
        "outlines_on_each_other": {name: round(mean(each), 3) for name, each in scores.items()},
        "better_with": sum(a > b for a, b in zip(scores["with"], scores["without"], strict=True)),
    }
    return told, np.concatenate(rows[:6])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("name", choices=TRAINING_FLAGS)
    parser.add_argument("--home", type=Path, help="clips, LoRA and sheet; else runs/lora-NAME")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    home = asked.home or Path("runs") / f"lora-{asked.name}"
    home.mkdir(parents=True, exist_ok=True)
    lora, seconds = train_lora(asked.name, home)
    told, sheet = measure_teal(lora, asked.videos) if asked.name == "teal" else measure_edges(lora, asked.videos, home)
    Image.fromarray(sheet).save(home / "sheet.png")
    machine = describe_machine(torch.device("cpu"))
    made = {"machine": machine, "trained_by": TRAINING_FLAGS[asked.name], "seconds_of_training": seconds, **told}
    (asked.results / f"lora-demo-{asked.name}.json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    print(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
