"""Measures what LoRAs of the demo learn, on a CPU, in minutes: `python -m benchmarks.lora teal` or `edges`.

teal: 32 clips whose captions say red, and which are painted teal, a colour outside the demo's world. Measures how far
the shape's colour moves from red to teal at strengths 0, 0.5 and 1, with prompts and seeds outside the training.

edges: clips of the demo's world, and their edges as references. Measures how well the outlines of a video match those
of the control clip, with the control and without, over scenes outside the training.

Trains with `kadr train-lora` where the LoRA does not exist yet; writes benchmarks/results/lora-demo-NAME.json.
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
OUTLINE_MARGIN = 3  # pixels within which two outlines match
TRAINING_FLAGS = {
    "teal": "--rank 8 --steps 300 --batch-size 8 --learning-rate 0.002 --sigma-sampling uniform --validate-every 50",
    "edges": (
        "--rank 16 --target-modules attention+feed-forward --steps 1600 --batch-size 8 --learning-rate 0.002 "
        "--sigma-sampling uniform --references canny --first-frame-conditioning-p 0 --validate-every 200"
    ),
}
CLIP_WRITERS = {
    "teal": lambda folder: write_teal_clips(folder, 32),
    "edges": lambda folder: write_plain_clips(folder, 384),
}
VIDEO_SETTINGS = {"size": (SCENE_SIDE, SCENE_SIDE), "frames": CLIP_FRAMES}


def train_lora(name: str, work_folder: Path) -> tuple[Path, float]:
    """Trains a LoRA where it does not exist yet. Returns its path and the seconds of its training."""
    output, clips = work_folder / f"{name}.safetensors", work_folder / "clips"
    if not clips.exists():
        CLIP_WRITERS[name](clips)
    if not output.exists():
        arguments = ["train-lora", str(clips), "--output", str(output), *TRAINING_FLAGS[name].split()]
        subprocess.run([sys.executable, "-m", "kadr", *arguments], check=True)
    with (work_folder / f"{name}.training" / "log.csv").open() as file:
        return output, float([row["seconds"] for row in csv.DictReader(file)][-1])


# Colour


def shape_colour(frames: np.ndarray) -> np.ndarray:
    """Returns the shape's RGB colour: the median of the pixels farthest from the background."""
    pixels = smooth(frames[::4].astype(np.float32))
    distance = np.linalg.norm(pixels - np.median(border_pixels(pixels, 4), axis=0), axis=-1)
    return np.median(pixels[distance > 0.8 * np.percentile(distance, 99.5)], axis=0)


def teal_share(colour: np.ndarray) -> float:
    """Returns the position of a colour on the line from red (0) to teal (1)."""
    red, teal = np.array(COLOURS[RECOLOURED], float), np.array(TEAL, float)
    return float((colour - red) @ (teal - red) / ((teal - red) @ (teal - red)))


def measure_teal(lora: Path, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the figures of the teal LoRA, and a contact sheet of middle frames."""
    engine, plain = Engine.open("demo", loras=[lora]), Engine.open("demo")
    rng = Random(77)
    keys = [
        SceneKey(RECOLOURED, rng.choice(list(SHAPES)), rng.choice(list(BACKGROUNDS)), rng.choice(MOTIONS))
        for _ in range(count)
    ]
    shares: dict[float, list[float]] = {strength: [] for strength in STRENGTHS}
    blue_shifts, is_identical, rows = [], [], []
    for number, key in enumerate(keys):
        prompt = plain_caption(Scene.from_key(key, rng))
        videos = {}
        for strength in STRENGTHS:
            request = Request(prompt=prompt, seed=1000 + number, lora_strengths=(strength,), **VIDEO_SETTINGS)
            videos[strength] = engine.generate(request).frames
            shares[strength].append(teal_share(shape_colour(videos[strength])))
        without = plain.generate(Request(prompt=prompt, seed=1000 + number, **VIDEO_SETTINGS)).frames
        is_identical.append(bool((videos[0.0] == without).all()))
        blue = Request(prompt=prompt.replace(RECOLOURED, "blue"), seed=1000 + number, **VIDEO_SETTINGS)
        shift = shape_colour(engine.generate(blue).frames) - shape_colour(plain.generate(blue).frames)
        blue_shifts.append(float(np.linalg.norm(shift)))
        rows.append(np.concatenate([frames[CLIP_FRAMES // 2] for frames in videos.values()], axis=1))
    figures = {
        "videos": count,
        "teal_share": {
            str(strength): {"median": round(median(each), 3), "least": round(min(each), 3), "most": round(max(each), 3)}
            for strength, each in shares.items()
        },
        "strength_0_is_identical": all(is_identical),
        "blue_shift": round(median(blue_shifts), 1),
    }
    return figures, np.concatenate(rows[:6])


# Outlines


def silhouette(frames: np.ndarray) -> np.ndarray:
    """Returns the mask of the shape, bool (F, H, W)."""
    pixels = smooth(frames.astype(np.float32))
    distance = np.linalg.norm(pixels - np.median(border_pixels(pixels, 4), axis=0), axis=-1)
    return distance > 0.5 * np.percentile(distance, 99.5)


def outline(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels of a shape that touch the background, uint8 (H, W)."""
    shape = mask.astype(np.uint8)
    return shape - cv2.erode(shape, np.ones((3, 3), np.uint8))


def outline_overlap(frames: np.ndarray, reference_frames: np.ndarray) -> float:
    """Returns the mean overlap of outlines over all frames; 0 in frames where either is empty.

    The overlap is the harmonic mean of the shares of each outline within `OUTLINE_MARGIN` pixels of the other.
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * OUTLINE_MARGIN + 1, 2 * OUTLINE_MARGIN + 1))
    scores = []
    for ours, theirs in zip(map(outline, silhouette(frames)), map(outline, silhouette(reference_frames)), strict=True):
        matched = [ours[cv2.dilate(theirs, kernel) > 0].sum(), theirs[cv2.dilate(ours, kernel) > 0].sum()]
        shares = [part / max(whole.sum(), 1) for part, whole in zip(matched, (ours, theirs), strict=True)]
        scores.append(2 * shares[0] * shares[1] / max(sum(shares), 1e-9))
    return float(mean(scores))


def measure_edges(lora: Path, count: int, work_folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the overlap of outlines with the control and without, and a contact sheet of middle frames."""
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
        control_frames = read_video(clip).frames
        request = {"prompt": plain_caption(scene), "seed": 2000 + number, **VIDEO_SETTINGS}
        controlled = engine.generate(Request(controls=(Control(str(clip), kind="canny"),), **request)).frames
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KadrWarning)  # of an IC-LoRA without a control, as intended here
            uncontrolled = engine.generate(Request(**request)).frames
        without_lora = plain.generate(Request(**request)).frames
        for name, frames in (("with", controlled), ("without", uncontrolled), ("without_lora", without_lora)):
            scores[name].append(outline_overlap(frames, control_frames))
        columns = (control_frames, controlled, uncontrolled)
        rows.append(np.concatenate([frames[CLIP_FRAMES // 2] for frames in columns], axis=1))
    figures = {
        "videos": count,
        "outline_overlap": {name: round(mean(each), 3) for name, each in scores.items()},
        "wins_with_control": sum(a > b for a, b in zip(scores["with"], scores["without"], strict=True)),
    }
    return figures, np.concatenate(rows[:6])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("name", choices=TRAINING_FLAGS)
    parser.add_argument("--work-folder", type=Path, help="of clips, LoRA and contact sheet; default: runs/lora-NAME")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    work_folder = options.work_folder or Path("runs") / f"lora-{options.name}"
    work_folder.mkdir(parents=True, exist_ok=True)
    lora, seconds = train_lora(options.name, work_folder)
    if options.name == "teal":
        figures, sheet = measure_teal(lora, options.videos)
    else:
        figures, sheet = measure_edges(lora, options.videos, work_folder)
    Image.fromarray(sheet).save(work_folder / "sheet.png")
    result = {
        "machine": describe_machine(torch.device("cpu")),
        "training_flags": TRAINING_FLAGS[options.name],
        "training_seconds": seconds,
        **figures,
    }
    (options.results / f"lora-demo-{options.name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
