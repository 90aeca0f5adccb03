"""Evaluates the demo model: `python -m train.evaluate`. Prints one JSON object.

Captions are of combinations that were held out of training; `train.judge` measures what the videos show.
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
MIDDLE_FRAME = 13  # pixel frame of the keyframe
JOIN_TOLERANCE = 6.0  # scene pixels
FOLLOW_TOLERANCE = 10.0
RECOLOUR_STRENGTH = 0.7  # denoise strength of video to video


def prompt_adherence(engine: Engine, captions: Sequence[tuple[str, Scene]], **settings: Any) -> dict[str, float]:
    """Returns the share of videos that match their caption, by property. settings: of the requests."""
    matches = dict.fromkeys(PROPERTIES, 0)
    for seed, (caption, scene) in enumerate(captions):
        video = engine.generate(Request(prompt=caption, seed=seed, **settings))
        for name, shown, expected in zip(PROPERTIES, name_scene(video.frames), scene.key, strict=True):
            matches[name] += shown == expected
    return {name: count / len(captions) for name, count in matches.items()}


def first_frame_fidelity(engine: Engine, captions: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Measures image to video: PSNR of the first frame, in dB against the VAE's round trip, and the motion."""
    psnrs, right_motions = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.png"
            Image.fromarray(render_frame(scene)).save(path)
            request = Request(prompt=plain_caption(scene), seed=seed, conditions=(Condition(media=str(path)),))
            video = engine.generate(request)
            psnrs.append(psnr(video.frames[0], vae_round_trip(engine, path)))
            right_motions += name_scene(video.frames).motion == scene.motion
    return {"psnr_mean": float(np.mean(psnrs)), "psnr_min": min(psnrs), "motion": right_motions / len(captions)}


def keyframe_fidelity(
    engine: Engine, captions: Sequence[tuple[str, Scene]], frame: int = MIDDLE_FRAME
) -> dict[str, float]:
    """Measures a keyframe in the middle: its PSNR, in dB against the VAE's round trip, and if the motion is continuous.

    "joins" is the share of videos whose shape is within `JOIN_TOLERANCE` of its position in the scene at that frame,
    within the same distance of the line through the frames around it, and moves as in the caption.
    """
    psnrs, joined = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.png"
            Image.fromarray(render_frame(scene, frame)).save(path)
            condition = Condition(media=str(path), frame=frame)
            video = engine.generate(Request(prompt=plain_caption(scene), seed=seed, conditions=(condition,)))
            psnrs.append(psnr(video.frames[frame], vae_round_trip(engine, path)))
            track, expected = track_shape(video.frames), track_shape(render_frames(scene, CLIP_FRAMES))
            jump = track[frame] - (track[frame - 2] + track[frame + 2]) / 2
            offset = track[frame] - expected[frame]
            is_continuous = np.abs(offset).max() < JOIN_TOLERANCE and np.abs(jump).max() < JOIN_TOLERANCE
            joined += bool(is_continuous) and name_scene(video.frames).motion == scene.motion
    return {"psnr_mean": float(np.mean(psnrs)), "psnr_min": min(psnrs), "joins": joined / len(captions)}


def extension_error(
    engine: Engine, captions: Sequence[tuple[str, Scene]], *, input_frames: int, is_backward: bool = False
) -> dict[str, float]:
    """Measures the extension of a clip of `input_frames` frames, forward or backward: distances from the scene's track.

    Distances are of the shape's centre, in scene pixels, at the frame farthest from the clip ("far") and at the one
    next to it ("near"). "follows" is the share of videos within `FOLLOW_TOLERANCE` at the far frame.
    """
    far, near = (0, CLIP_FRAMES - input_frames - 1) if is_backward else (CLIP_FRAMES - 1, input_frames)
    distances = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.mp4"
            first = CLIP_FRAMES - input_frames if is_backward else 0
            scene_frames = render_frames(scene, CLIP_FRAMES)
            with VideoWriter(path, Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
                writer.write(scene_frames[first : first + input_frames])
            condition = Condition(media=str(path), frame=first)
            video = engine.generate(Request(prompt=plain_caption(scene), seed=seed, conditions=(condition,)))
            errors = np.linalg.norm((track_shape(video.frames) - track_shape(scene_frames))[:, :2], axis=1)
            distances.append((errors[far], errors[near]))
    far_near = np.nan_to_num(np.array(distances), nan=SCENE_SIDE)
    follows = float((far_near[:, 0] < FOLLOW_TOLERANCE).mean())
    return {"far": float(np.median(far_near[:, 0])), "near": float(np.median(far_near[:, 1])), "follows": follows}


def recolour_rates(
    engine: Engine, captions: Sequence[tuple[str, Scene]], strength: float = RECOLOUR_STRENGTH
) -> dict[str, float]:
    """Measures video to video with another colour in the prompt: shares with the new colour and the same motion."""
    recoloured = right_motions = 0
    names = tuple(COLOURS)
    with tempfile.TemporaryDirectory() as folder:
        for seed, (_, scene) in enumerate(captions):
            path = Path(folder) / f"{seed}.mp4"
            with VideoWriter(path, Size(SCENE_SIDE, SCENE_SIDE), FPS) as writer:
                writer.write(render_frames(scene, CLIP_FRAMES))
            target = replace(scene, colour=names[(names.index(scene.colour) + 3) % len(names)])
            request = Request(prompt=plain_caption(target), seed=seed, input_video=str(path), denoise_strength=strength)
            verdict = name_scene(engine.generate(request).frames)
            recoloured += verdict.colour == target.colour
            right_motions += verdict.motion == scene.motion
    return {"colour": recoloured / len(captions), "motion": right_motions / len(captions)}


def two_pass_sharpness(engine: Engine, captions: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Compares two passes with the first pass resized: steepness of edges, and prompt adherence.

    Steepness is the mean of the largest 1 % of the steps between neighbouring pixels, in grey values of 0 to 255, over
    all frames: only edges are that steep in these scenes.
    """
    steepness: list[tuple[float, float, float]] = []
    matches = dict.fromkeys(PROPERTIES, 0)
    for seed, (caption, scene) in enumerate(captions):
        two_passes = engine.generate(Request(prompt=caption, seed=seed, size=(256, 256), multi_scale=True))
        request = Request(prompt=caption, seed=seed, size=(128, 128), multi_scale=False)
        request = request.with_passes(engine.spec.recipe.first_pass, None)
        resized = np.stack([np.asarray(Image.fromarray(f).resize((256, 256), Image.Resampling.BICUBIC))
                            for f in engine.generate(request).frames])  # fmt: skip
        steepness.append(
            (
                edge_steepness(two_passes.frames),
                edge_steepness(resized),
                edge_steepness(render_frames(scene, CLIP_FRAMES, 256)),
            )
        )
        for name, shown, expected in zip(PROPERTIES, name_scene(two_passes.frames), scene.key, strict=True):
            matches[name] += shown == expected
    two, resized_first, scenes = np.array(steepness).T
    return {
        "two passes": float(two.mean()),
        "resized": float(resized_first.mean()),
        "scenes": float(scenes.mean()),
        "sharper": float((two > resized_first).mean()),
        **{name: count / len(captions) for name, count in matches.items()},
    }


def edge_steepness(frames: np.ndarray) -> float:
    """Returns the steepness of edges as `two_pass_sharpness` defines it. frames: uint8 (F, H, W, 3)."""
    grey = frames.astype(np.float32).mean(-1)
    steps = np.abs(np.concatenate([np.diff(grey, axis=1).ravel(), np.diff(grey, axis=2).ravel()]))
    return float(np.sort(steps)[-len(steps) // 100 :].mean())


def render_frame(scene: Scene, frame: int = 0) -> np.ndarray:
    """Renders one frame of a scene, uint8 (H, W, 3)."""
    return render_frames(scene, 1, first=frame)[0]


def render_frames(scene: Scene, frames: int, side: int = SCENE_SIDE, first: int = 0) -> np.ndarray:
    """Renders frames of a scene, uint8 (F, H, W, 3)."""
    pixels = render([scene], frames, (side, side), first_frame=first)[0]
    return ((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 3, 0).numpy()


@torch.no_grad()
def vae_round_trip(engine: Engine, path: Path) -> np.ndarray:
    """Encodes and decodes an image with the VAE, uint8 (H, W, 3)."""
    request = Request(prompt="-", frames=1, conditions=(Condition(media=str(path)),))
    return engine.decode(engine.encode_first_condition(request), request).numpy()[0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the PSNR of two uint8 images, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=__doc__)
    parser.add_argument("--captions", type=int, default=60, help="videos of the text-to-video measurements")
    parser.add_argument("--images", type=int, default=24, help="videos of each other measurement")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    engine, distilled = Engine.open("demo"), Engine.open("demo-distilled")
    captions = held_out_captions(options.captions, options.seed)
    caption_sets = [held_out_captions(options.images, options.seed + offset) for offset in range(1, 6)]
    report = {
        "text": prompt_adherence(engine, captions),
        "text without guidance": prompt_adherence(engine, captions, guidance=1.0),
        "text, distilled": prompt_adherence(distilled, captions, multi_scale=False, size=(SCENE_SIDE, SCENE_SIDE)),
        "image at 0": first_frame_fidelity(engine, caption_sets[0]),
        "image in the middle": keyframe_fidelity(engine, caption_sets[1]),
        "forward": extension_error(engine, caption_sets[2], input_frames=17),
        "backward": extension_error(engine, caption_sets[2], input_frames=17, is_backward=True),
        "forward from 9 frames": extension_error(engine, caption_sets[2], input_frames=9),
        "video to video": recolour_rates(engine, caption_sets[3]),
        "two passes": two_pass_sharpness(distilled, caption_sets[4]),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
