"""Progress reports of a generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

PREVIEW_STAGE = "preview"  # fits the map for previews; no stage of a video, and not in a plan
STAGES = ("text", "control", "encode", "train", "denoise", "upscale", "refine", "decode")


@dataclass(frozen=True)
class Progress:
    """One progress report.

    Args:
        stage: "preview" (the map for previews is fitted, once per VAE), "text", "control" (a network estimates depth or
            poses), "encode" (only with images or clips), "denoise", then "upscale" and "refine" if there is a second
            pass, and "decode".
        step: number of finished steps of the stage, 0 when it starts.
        of: total number of steps. Steps of "control" and "decode" are frames, those of "preview" clips.
        sigma: sigma of the step just finished; None except in "denoise" and "refine".
        eta: estimated seconds until the stage ends, at its pace so far; None before its first step.
        window: of a long video, (number of the current window from 1, number of windows). Steps count over all windows.
        render_preview: see `preview`.
    """

    stage: str
    step: int
    of: int
    sigma: float | None = None
    eta: float | None = None
    window: tuple[int, int] | None = None
    render_preview: Callable[[], np.ndarray] | None = field(default=None, repr=False, compare=False)

    @property
    def preview(self) -> np.ndarray | None:
        """The video as this step predicts it: uint8 (f, h, w, 3), RGB, an eighth of the frames, a quarter of each side.

        Only in "denoise" and "refine", and if the generation was started with `preview`; else None. It is computed when
        it is read, within milliseconds; read it before the next step, or its tensors stay in memory.
        """
        return None if self.render_preview is None else self.render_preview()


Watch = Callable[[Progress], None]
OnLoad = Callable[[bool], object]


def ignore_progress(progress: Progress) -> None:
    """Ignores a report."""


def ignore_loads(is_loading: bool) -> None:
    """Ignores that a module is loaded."""


@dataclass
class StageProgress:
    """Reporter of one stage: calls `watch` when the stage starts and after every step.

    Args:
        steps_before: steps of the stage finished earlier, in other windows.
        window: see `Progress`.
    """

    name: str
    total: int
    watch: Watch
    steps_before: int = 0
    window: tuple[int, int] | None = None
    started_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.watch(Progress(self.name, self.steps_before, self.total, window=self.window))

    def report(
        self, step: int, sigma: float | None = None, render_preview: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Reports progress. step: number of finished steps, without `steps_before`."""
        pace, done = (time.monotonic() - self.started_at) / max(step, 1), self.steps_before + step
        eta = pace * (self.total - done)
        self.watch(Progress(self.name, done, self.total, sigma, eta, self.window, render_preview))
