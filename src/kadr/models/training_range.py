"""Sizes, frame counts and frame rates that models were trained at, as data: outside of them a video looks worse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingRange:
    """The videos that a model was trained with.

    Args:
        min_pixels, max_pixels: width times height of a frame.
        max_frames: of a video in one piece, or of a window.
        min_fps, max_fps: frames per second.
    """

    min_pixels: int
    max_pixels: int
    max_frames: int
    min_fps: float
    max_fps: float


# The model cards say up to 720x1280 and 257 frames; the official code runs at 30 frames per second, its trainer at 24.
# No source has a smallest size: half of the 512x384 that other engines offer as their smallest is a rule of thumb.
LTX_VIDEO_RANGE = TrainingRange(min_pixels=384 * 256, max_pixels=1280 * 720, max_frames=257, min_fps=24.0, max_fps=30.0)
# See train/transformer.py and train/tuning.py: clips of 25 frames at 24 per second, 128x128 and 256x256.
DEMO_RANGE = TrainingRange(min_pixels=128 * 128, max_pixels=256 * 256, max_frames=25, min_fps=24.0, max_fps=24.0)
