"""How well the demo model does what it is told: `python -m train.evaluate`. Prints one JSON object.

Captions come from combinations that training never saw; what the videos show is measured by `train.judge`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kadr import Condition, Engine, Request
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from train.judge import name_scene, track_shape
from train.scenes import CLIP_FRAMES, COLOURS, SCENE_SIDE, Scene, held_out_captions, plain_caption, render

PROPERTIES = ("colour", "shape", "background", "motion")
FPS = 24.0
MIDDLE_FRAME = 13  # the frame of a keyframe
JOIN_TOLERANCE = 6.0  # pixels of the stage
FOLLOW_TOLERANCE = 10.0
RECOLOUR_STRENGTH = 0.7  # strength of video to video


def prompt_adherence(engine: Engine, captions: Sequence[tuple[str, Scene]], **settings: Any) -> dict[str, float]:
    """The share of videos that show what their caption says, by property. settings: of the requests."""
    right = dict.fromkeys(PROPERTIES, 0)
    for seed, (caption, scene) in enumerate(captions):
        video = engine.generate(Request(prompt=caption, seed=seed, **settings))
        for name, seen, told in zip(PROPERTIES, name_scene(video.frames), scene.key, strict=True):
            right[name] += seen == told
    return {name: count / len(captions) for name, count in right.items()}


def first_frame_fidelity(engine: Engine, captions: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Image-to-video: how well the first frame is kept, in dB against the VAE's own round trip, and the motion."""
    kept_db, moved = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.png"
            Image.fromarray(render_frame(scene)).save(path)
            request = Request(prompt=plain_caption(scene), seed=seed, conditions=(Condition(media=str(path)),))
            video = engine.generate(request)
            kept_db.append(psnr(video.frames[0], vae_round_trip(engine, path)))
            moved += name_scene(video.frames).motion == scene.motion
    return {"psnr_mean": float(np.mean(kept_db)), "psnr_least": min(kept_db), "motion": moved / len(captions)}


def keyframe_fidelity(
    engine: Engine, captions: Sequence[tuple[str, Scene]], frame: int = MIDDLE_FRAME
) -> dict[str, float]:
    """A picture in the middle: how well it is met, in dB against the VAE's own round trip, and how the motion joins it.

    "joins" is the share of videos whose shape is within JOINED pixels of its place in the scene at that frame, jumps
    by no more than that from the line through its neighbours, and moves as told.
    """
    met, joined = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.png"
            Image.fromarray(render_frame(scene, frame)).save(path)
            condition = Condition(media=str(path), frame=frame)
            video = engine.generate(Request(prompt=plain_caption(scene), seed=seed, conditions=(condition,)))
            met.append(psnr(video.frames[frame], vae_round_trip(engine, path)))
            seen, true = track_shape(video.frames), track_shape(render_frames(scene, CLIP_FRAMES))
            jump = seen[frame] - (seen[frame - 2] + seen[frame + 2]) / 2
            near = np.abs(seen[frame] - true[frame]).max() < JOIN_TOLERANCE and np.abs(jump).max() < JOIN_TOLERANCE
            joined += bool(near) and name_scene(video.frames).motion == scene.motion
    return {"psnr_mean": float(np.mean(met)), "psnr_least": min(met), "joins": joined / len(captions)}


def extension_error(
    engine: Engine, captions: Sequence[tuple[str, Scene]], *, input_frames: int, is_backward: bool = False
) -> dict[str, float]:
    """A clip of `input_frames` frames goes on, or is led up to: how far its shape is from the scene's own track.

    Distances are of the centre, in pixels, at the frame farthest from what was given, and at the seam's neighbour.
    "follows" is the share of videos within FOLLOWED at the far end.
    """
    far, near = (0, CLIP_FRAMES - input_frames - 1) if is_backward else (CLIP_FRAMES - 1, input_frames)
    distances = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.mp4"
            first = CLIP_FRAMES - input_frames if is_backward else 0
            true = render_frames(scene, CLIP_FRAMES)
            with VideoWriter(path, Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
                writer.write(true[first : first + input_frames])
            condition = Condition(media=str(path), frame=first)
            video = engine.generate(Request(prompt=plain_caption(scene), seed=seed, conditions=(condition,)))
            off = np.linalg.norm((track_shape(video.frames) - track_shape(true))[:, :2], axis=1)
            distances.append((off[far], off[near]))
    ends = np.nan_to_num(np.array(distances), nan=SCENE_SIDE)
    follows = float((ends[:, 0] < FOLLOW_TOLERANCE).mean())
    return {"far": float(np.median(ends[:, 0])), "near": float(np.median(ends[:, 1])), "follows": follows}


def recolour_rates(
    engine: Engine, captions: Sequence[tuple[str, Scene]], strength: float = RECOLOUR_STRENGTH
) -> dict[str, float]:
    """Video to video with another colour in the prompt: the shares that take it and that keep the motion."""
    took = moved = 0
    names = tuple(COLOURS)
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.mp4"
            with VideoWriter(path, Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
                writer.write(render_frames(scene, CLIP_FRAMES))
            other = replace(scene, colour=names[(names.index(scene.colour) + 3) % len(names)])
            request = Request(prompt=plain_caption(other), seed=seed, input_video=str(path), denoise_strength=strength)
            verdict = name_scene(engine.generate(request).frames)
            took += verdict.colour == other.colour
            moved += verdict.motion == scene.motion
    return {"colour": took / len(captions), "motion": moved / len(captions)}


def two_pass_sharpness(engine: Engine, captions: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Two passes against the first one resized to the same size: how steep the edges are, and what is obeyed.

    Steepness is the mean of the one per cent largest steps between neighbouring pixels, in grey levels of 255, over all
    frames: edges, and nothing else, are that steep in this world.
    """
    steep: list[tuple[float, float, float]] = []
    right = dict.fromkeys(PROPERTIES, 0)
    for seed, (caption, scene) in enumerate(captions):
        both = engine.generate(Request(prompt=caption, seed=seed, size=(256, 256), multi_scale=True))
        first = engine.recipe.first_pass
        alone = Request(prompt=caption, seed=seed, size=(128, 128), multi_scale=False).with_passes(first, None)
        resized = np.stack([np.asarray(Image.fromarray(f).resize((256, 256), Image.Resampling.BICUBIC))
                            for f in engine.generate(alone).frames])  # fmt: skip
        steep.append(
            (
                edge_steepness(both.frames),
                edge_steepness(resized),
                edge_steepness(render_frames(scene, CLIP_FRAMES, 256)),
            )
        )
        for name, seen, told in zip(PROPERTIES, name_scene(both.frames), scene.key, strict=True):
            right[name] += seen == told
    made, before, true = np.array(steep).T
    return {
        "two passes": float(made.mean()),
        "resized": float(before.mean()),
        "scenes": float(true.mean()),
        "sharper": float((made > before).mean()),
        **{name: count / len(captions) for name, count in right.items()},
    }


def edge_steepness(frames: np.ndarray) -> float:
    """See `two_pass_sharpness`. frames: uint8 (F, H, W, 3)."""
    grey = frames.astype(np.float32).mean(-1)
    steps = np.abs(np.concatenate([np.diff(grey, axis=1).ravel(), np.diff(grey, axis=2).ravel()]))
    return float(np.sort(steps)[-len(steps) // 100 :].mean())


def render_frame(scene: Scene, frame: int = 0) -> np.ndarray:
    """One frame of a scene, uint8 (H, W, 3)."""
    return render_frames(scene, 1, first=frame)[0]


def render_frames(scene: Scene, frames: int, side: int = SCENE_SIDE, first: int = 0) -> np.ndarray:
    """Frames of a scene, uint8 (F, H, W, 3)."""
    pixels = render([scene], frames, (side, side), first_frame=first)[0]
    return ((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 3, 0).numpy()


@torch.no_grad()
def vae_round_trip(engine: Engine, path: Path) -> np.ndarray:
    """The picture as the VAE alone gives it back, uint8 (H, W, 3)."""
    request = Request(prompt="-", frames=1, conditions=(Condition(media=str(path)),))
    return engine.decode(engine.encode_first_condition(request), request).numpy()[0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of uint8 pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument("--captions", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2026)
    chosen = parser.parse_args()
    engine, few = Engine.open("demo"), Engine.open("demo-distilled")
    captions = held_out_captions(chosen.captions, chosen.seed)
    others = [held_out_captions(chosen.pictures, chosen.seed + number) for number in range(1, 6)]
    report = {
        "text": prompt_adherence(engine, captions),
        "text without guidance": prompt_adherence(engine, captions, guidance=1.0),
        "text, distilled": prompt_adherence(few, captions, multi_scale=False, size=(SCENE_SIDE, SCENE_SIDE)),
        "picture at 0": first_frame_fidelity(engine, others[0]),
        "picture in the middle": keyframe_fidelity(engine, others[1]),
        "forward": extension_error(engine, others[2], input_frames=17),
        "backward": extension_error(engine, others[2], input_frames=17, is_backward=True),
        "forward from 9 frames": extension_error(engine, others[2], input_frames=9),
        "video to video": recolour_rates(engine, others[3]),
        "two passes": two_pass_sharpness(few, others[4]),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
