"""`LiveJob`: a job in progress as its supervisor sees it, with its time left and the patience that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kadr.jobs.claims import Claim


@dataclass(frozen=True)
class Patience:
    """Times that a supervisor waits before it kills a worker, in seconds.

    Args:
        start: until it is ready; and between two signs of life while it opens a model: a process gives none while the
            system loads large libraries for it.
        beat: between two signs of life otherwise; a worker that is stopped gives none.
        cancel: until it stops, once cancelled: at least this, and twice the longest layer of its plan.
        stall: without progress: at least this, and `stall_factor` times what its plan gives to the stage.
        prepare: until it has a plan: models are opened, and fetched where they are missing.
    """

    start: float = 300.0
    beat: float = 30.0
    cancel: float = 2.0
    stall: float = 120.0
    stall_factor: float = 4.0
    prepare: float = 6 * 3600.0


@dataclass
class LiveJob:
    """A job in progress, with what its worker reported; nothing of it is stored.

    Args:
        has_started: its worker has begun it: from then on, it may be what kills the worker.
        is_loading: the model is opened or fetched, before the first stage, or a module is loaded, during or before
            any.
        progress: the newest report.
        seconds_left: of the whole job, estimated; None before the plan is known.
    """

    claim: Claim
    worker: str
    began: float
    has_started: bool = False
    is_loading: bool = False
    progress: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    preview: bytes | None = None
    cancelled_at: float | None = None
    progressed_at: float = 0.0
    beat_at: float = 0.0

    def overdue(self, patience: Patience, now: float) -> str | None:
        """Says what the worker did not do in time, as the predicate of a sentence; None while it is in time."""
        if self.cancelled_at is not None:
            promised = max(patience.cancel, 2 * self.plan.get("layer_seconds", 0.0))
            if now - self.cancelled_at > promised:
                return f"did not stop within {promised:.0f} s of being cancelled"
        is_opening = self.has_started and not self.plan
        silence = max(patience.beat, patience.start) if is_opening else patience.beat
        if now - self.beat_at > silence:
            return f"gave no sign of life for {silence:.0f} s"
        allowed = patience.prepare
        if self.plan:
            stage_seconds = self.plan["stage_seconds"]
            stage = None if self.is_loading else self.progress.get("stage")  # a module may be that of the next one
            of_stage = stage_seconds.get(stage, max(stage_seconds.values(), default=0.0))
            allowed = max(patience.stall, patience.stall_factor * of_stage)
        if now - self.progressed_at > allowed:
            return f"made no progress for {allowed:.0f} s"
        return None

    @property
    def report(self) -> dict[str, Any]:
        """The newest report of the worker, with what follows from it for the whole job."""
        return {
            "stage": None,
            "step": None,
            "of": None,
            **self.progress,
            "is_loading": self.is_loading,
            "fraction": self.fraction,
            "seconds_left": self.seconds_left,
        }

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the job is made: of the stage by its pace, of later ones by the plan."""
        if not self.plan:
            return None
        stages, stage = list(self.plan["stage_seconds"]), self.progress.get("stage")
        later = stages[stages.index(stage) + 1 :] if stage in stages else stages
        of_stage = self.progress.get("eta")
        if of_stage is None:
            of_stage = self.plan["stage_seconds"].get(stage, 0.0) if stage in stages else 0.0
        return float(of_stage + sum(self.plan["stage_seconds"][name] for name in later))

    @property
    def fraction(self) -> float:
        """The part of the job that is made, in time by its plan, 0 to 1."""
        if not self.plan or not self.progress:
            return 0.0
        seconds, stage = self.plan["stage_seconds"], self.progress["stage"]
        names = list(seconds)
        if stage not in names:
            return 0.0
        done = sum(seconds[name] for name in names[: names.index(stage)])
        part = self.progress["step"] / max(self.progress["of"], 1)
        return min(1.0, (done + part * seconds[stage]) / max(sum(seconds.values()), 1e-9))
