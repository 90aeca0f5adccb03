"""Progress in words: a line for the end of every stage, and every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from kadr.pipeline.progress import Progress, Watch

SECONDS_BETWEEN_LINES = 5.0  # without a terminal
STAGE_LABELS = {
    "preview": "fitting previews",
    "text": "encoding the prompt",
    "control": "rendering controls",
    "encode": "encoding images",
    "train": "training",
    "denoise": "denoising",
    "upscale": "upscaling",
    "refine": "refining",
    "decode": "decoding",
}


def watch_in_lines(
    print_line: Callable[[str], object],
    clock: Callable[[], float] = time.monotonic,
    *,
    position: tuple[int, int] | None = None,
) -> Watch:
    """Returns a watcher that prints a line at the end of every stage, and every few seconds.

    Args:
        position: of several videos, (number of this one, number of videos).
    """
    last = clock()

    def watch(progress: Progress) -> None:
        nonlocal last
        if 0 < progress.step == progress.of or clock() - last >= SECONDS_BETWEEN_LINES:
            last = clock()
            print_line(describe_progress(progress, position))

    return watch


def describe_progress(progress: Progress, position: tuple[int, int] | None = None) -> str:
    """Returns a line such as "denoising: 3 of 9, 0:12 left"; position as for `watch_in_lines`."""
    return f"{stage_label(progress, position)}: {progress.step} of {progress.of}{time_left(progress, ', ')}"


def stage_label(progress: Progress, position: tuple[int, int] | None = None) -> str:
    """Returns the stage in words, with the window and the position."""
    places = (("window", progress.window), ("video", position))
    counts = [f"{name} {place[0]} of {place[1]}" for name, place in places if place is not None]
    return ", ".join([STAGE_LABELS.get(progress.stage, progress.stage), *counts])


def time_left(progress: Progress, prefix: str = "") -> str:
    """Returns the time left in the stage; "" if it is unknown or over."""
    is_known = progress.eta is not None and progress.step < progress.of
    return f"{prefix}{format_duration(progress.eta or 0)} left" if is_known else ""


def format_duration(seconds: float) -> str:
    """Formats seconds as 0:07 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
