"""Checks of a request's size, number of frames and frame rate against those that the model was trained at."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.diagnosis.finding import QUALITY, Finding
from kadr.request.fit_size import fitting_size
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec

PIXEL_TOLERANCE = 0.3  # `--size auto` uses fewer pixels than the recipe where sides of multiples of 32 leave no choice
FPS_TOLERANCE = 0.05  # 23.976 is as good as 24


def check_video(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    """Yields the findings about size, number of frames and frame rate."""
    yield from _check_size(spec, resolved)
    yield from _check_frames(spec, resolved)
    yield from _check_fps(spec, resolved)


def _check_size(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    trained, size, good = spec.trained_at, resolved.size, spec.recipe.size
    pixels = resolved.sampled_size.width * resolved.sampled_size.height
    fix = f"--size {fitting_size(size.width, size.height, good.width * good.height)}"
    if pixels < (1 - PIXEL_TOLERANCE) * trained.min_pixels:
        message = f"{size} is small for this model, which is good at {good}: faces and details melt."
        yield Finding(QUALITY, "size", message, fix)
    elif pixels > trained.max_pixels:
        message = (
            f"{size} has more pixels than the videos that the model was trained with (its recipe has {good}): things "
            "repeat and motion slows down."
        )
        yield Finding(QUALITY, "size", message, fix)


def _check_frames(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    limit = spec.trained_at.max_frames
    windows = resolved.windows
    frames = resolved.frames if windows is None or windows.frames is None else windows.frames
    if frames > limit:
        piece = "in one piece" if windows is None else "in a window"
        message = (
            f"{frames} frames {piece} are more than the {limit} that the model was trained with: the end freezes or "
            "falls apart. A long video is made in windows."
        )
        single_pass = " --single-pass" if spec.recipe.multi_scale else ""
        yield Finding(QUALITY, "frames", message, f"--window {min(limit, spec.recipe.frames)}{single_pass}")


def _check_fps(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    trained = spec.trained_at
    low, high = trained.min_fps * (1 - FPS_TOLERANCE), trained.max_fps * (1 + FPS_TOLERANCE)
    if not low <= resolved.fps <= high:
        span = f"{trained.min_fps:g}" + ("" if trained.min_fps == trained.max_fps else f" to {trained.max_fps:g}")
        message = (
            f"the frame rate is {resolved.fps:g}, and the model was trained at {span}: motion comes out too "
            f"{'fast and jumpy' if resolved.fps < low else 'slow and small'}. Change the rate of the finished file."
        )
        yield Finding(QUALITY, "frame rate", message, f"--fps {spec.recipe.fps:g}")
