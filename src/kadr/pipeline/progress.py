"""How far a generation is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

STAGES = ("text", "control", "encode", "train", "denoise", "upscale", "refine", "decode")


@dataclass(frozen=True)
class Progress:
    """One report.

    Args:
        stage: "text", "control" (where a network looks for depth or poses), "encode" (only with pictures or clips),
            "denoise", then "upscale" and "refine" where there is a second pass, and "decode".
        step: how many steps of the stage are done, 0 when it begins.
        of: how many it has. Steps of "control" and "decode" are frames.
        sigma: the noise level of the step just done, in "denoise" and "refine" alone.
        eta: seconds until the stage is done, at its pace so far; None before its first step.
        window: of a long video, which window is being made and how many there are, from 1. The steps are those of all.
    """

    stage: str
    step: int
    of: int
    sigma: float | None = None
    eta: float | None = None
    window: tuple[int, int] | None = None


Watch = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Watch nothing."""


@dataclass
class StageProgress:
    """The clock of one stage: reports to `watch` when it begins and after every step.

    Args:
        steps_before: steps of the stage that are done already.
        window: as of `Progress`.
    """

    name: str
    total: int
    watch: Watch
    steps_before: int = 0
    window: tuple[int, int] | None = None
    started_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.watch(Progress(self.name, self.steps_before, self.total, window=self.window))

    def report(self, step: int, sigma: float | None = None) -> None:
        """step: how many are done, besides those of before."""
        pace, done = (time.monotonic() - self.started_at) / max(step, 1), self.steps_before + step
        self.watch(Progress(self.name, done, self.total, sigma, pace * (self.total - done), self.window))
