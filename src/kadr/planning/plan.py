"""What a run will need, and how it is made to fit. Arithmetic: nothing is loaded, nothing is measured.

Every stage comes with the ways it can be run, the best first. The plan takes for each the first that fits into what is
free; stages come one after the other, so each has all of it, less what is kept from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kadr.errors import PlanError

AS_STORED, CONVERTED = "as stored", "converted"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run a stage.

    Args:
        dtype: that is computed in: "bfloat16" or "float32".
        hold: "as stored" (converted while it is used), "converted" when it is loaded, or one of
            `quant.weight_formats`.
        streamed: how many blocks are in memory only while they run.
        frames: that the decoder's stages hand on at a time; 0 for other stages.
        winograd_frames: frames that packed convolutions make at a time; 0 where none are packed.
        mapped, own: bytes of weights in memory at once, on the device: in the pages of files, which can be let go of
            at any time, and others.
        working: bytes besides: activations, buffers.
        host: bytes on the host, where the device is another.
        seconds: about.
        windows: of a long video, in how many it is made; 0 where it is made at once.
        path: what its products are computed by, of the ways there are, in words.
        why: what speaks for it or made it necessary; "" for the plain way.
    """

    dtype: str
    hold: str = CONVERTED
    streamed: int = 0
    frames: int = 0
    together: int = 0
    mapped: int = 0
    own: int = 0
    working: int = 0
    host: int = 0
    seconds: float = 0.0
    windows: int = 0
    path: str = "torch"
    why: str = ""

    @property
    def bytes(self) -> int:
        """At the stage's peak, on the device."""
        return self.mapped + self.own + self.working


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A stage before anything is decided.

    Args:
        stage: "text", "encode", "denoise", "upscale", "refine" or "decode".
        component: the module, as the shelf names it.
        choices: the ways to run it, best first.
    """

    stage: str
    part: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage, decided.

    Args:
        rest: the ways that were left, for when memory runs out in spite of the plan.
        passed: the first way that did not fit, where the chosen one is not the best.
    """

    stage: str
    part: str
    choice: Choice
    rest: tuple[Choice, ...] = ()
    passed: Choice | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is in memory when, and how long it takes.

    Args:
        device: such as "cpu" or "cuda:0".
        base: bytes that the process takes without any of this.
        free: bytes that the run may take, on the device.
        stages: in the order they run.
        kept: parts that stay in memory for the next request.
    """

    device: str
    base: int
    free: int
    stages: tuple[StagePlan, ...]
    kept: frozenset[str] = frozenset()

    @property
    def peak_bytes(self) -> int:
        """Of the whole process at its worst moment; of the device's memory, where that is another."""
        return self.base + max((self.bytes_of(stage) for stage in self.stages), default=0)

    @property
    def seconds(self) -> float:
        return sum(stage.choice.seconds for stage in self.stages)

    def bytes_of(self, stage: StagePlan) -> int:
        """What a stage takes at its peak, with what the stages before have left in memory."""
        return stage.choice.bytes + _left_by(self.stages[: self.stages.index(stage)], stage.part, self.kept)

    def of(self, stage: str) -> StagePlan:
        """The plan of the stage of that name."""
        return next(each for each in self.stages if each.stage == stage)

    def lower(self, stage: str) -> Plan | None:
        """The plan with the next way down for a stage, one that takes less; None where there is none."""
        now = self.of(stage)
        smaller = [choice for choice in now.rest if choice.bytes < now.choice.bytes]
        if not smaller:
            return None
        rest = now.rest[now.rest.index(smaller[0]) + 1 :]
        changed = replace(now, choice=smaller[0], rest=rest, passed=now.choice)
        return replace(self, stages=tuple(changed if each is now else each for each in self.stages), kept=frozenset())

    def reasons(self) -> list[str]:
        """Why it is done so, stage by stage, where it is not the plain way."""
        told = []
        for stage in self.stages:
            why = stage.choice.why
            if stage.passed is not None:
                lacking = f"{in_words(stage.passed.bytes)} do not fit into {in_words(self.free)}"
                why = f"{why}, because {lacking}" if why else lacking
            if why:
                told.append(f"{stage.stage}: {why}")
            if stage.choice.windows:
                told.append(f"{stage.stage}: {stage.choice.windows} windows, one after the other")
        return told

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "device": self.device,
            "free_bytes": self.free,
            "base_bytes": self.base,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 1),
            "kept": sorted(self.kept),
            "reasons": self.reasons(),
            "stages": [
                {
                    "stage": stage.stage,
                    "part": stage.part,
                    "dtype": stage.choice.dtype,
                    "hold": stage.choice.hold,
                    "path": stage.choice.path,
                    "streamed_blocks": stage.choice.streamed,
                    "windows": stage.choice.windows,
                    "weight_bytes": stage.choice.mapped + stage.choice.own,
                    "working_bytes": stage.choice.working,
                    "host_bytes": stage.choice.host,
                    "peak_bytes": self.base + self.bytes_of(stage),
                    "seconds": round(stage.choice.seconds, 1),
                }
                for stage in self.stages
            ],
        }

    def __str__(self) -> str:
        rows = [("stage", "part", "held", "by", "peak", "about")]
        for stage in self.stages:
            peak = in_words(self.base + self.bytes_of(stage))
            way = held(stage.choice), stage.choice.path
            rows.append((stage.stage, stage.part, *way, peak, lasting(stage.choice.seconds)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary(), *self.reasons()])

    def summary(self) -> str:
        """The plan in one line."""
        return (
            f"peak {in_words(self.peak_bytes)} on {self.device}, where {in_words(self.base + self.free)} can be had; "
            f"about {lasting(self.seconds)}"
        )


def held(choice: Choice) -> str:
    """How the weights of a stage are held, in words."""
    words = choice.dtype if choice.hold in (AS_STORED, CONVERTED) else f"{choice.hold}, computed in {choice.dtype}"
    if choice.hold == AS_STORED:
        words = f"as stored, computed in {choice.dtype}"
    return f"{words}, {choice.streamed} blocks streamed" if choice.streamed else words


def make_plan(needs: Sequence[Needs], *, device: str, base: int, free: int, host_free: int) -> Plan:
    """Choose for each stage the first way that fits.

    Args:
        base, free: see `Plan`.
        host_free: bytes that are free on the host, where the device is another.

    Raises:
        PlanError: a stage has no way that fits; it carries the shortfall.
    """
    taken: dict[str, int] = {}  # part -> the number of its way: a module is held in one way by all who use it
    for need in needs:
        fitting = [
            number for number, choice in enumerate(need.choices) if choice.bytes <= free and choice.host <= host_free
        ]
        if not fitting:
            raise _unfit(need, free, host_free, device)
        taken[need.part] = max(taken.get(need.part, 0), fitting[0])
    stages = [_decided(need, taken[need.part]) for need in needs]
    plan = Plan(device=device, base=base, free=free, stages=tuple(stages))
    return replace(plan, kept=_kept(plan))


def _decided(need: Needs, number: int) -> StagePlan:
    passed = need.choices[0] if number else None
    rest = need.choices[number + 1 :]
    return StagePlan(stage=need.stage, part=need.part, choice=need.choices[number], rest=rest, passed=passed)


def _unfit(need: Needs, free: int, host_free: int, device: str) -> PlanError:
    least = min(need.choices, key=lambda choice: max(choice.bytes - free, choice.host - host_free))
    if least.bytes - free >= least.host - host_free:
        asked, there, where = least.bytes, free, device
    else:
        asked, there, where = least.host, host_free, "the host"
    return PlanError(
        f"{need.stage} needs {in_words(asked)} on {where} at the least, and {in_words(there)} are free: "
        f"{in_words(asked - there)} are missing.",
        shortfall=asked - there,
    )


def _kept(plan: Plan) -> frozenset[str]:
    """The parts that can stay in memory, the costliest to load first, as long as every stage still fits."""
    parts = {stage.part: stage.choice.own + stage.choice.mapped for stage in plan.stages}
    kept: set[str] = set()
    for part in sorted(parts, key=parts.__getitem__, reverse=True):
        trial = replace(plan, kept=frozenset(kept | {part}))
        # A second request begins with all of them in memory.
        again = sum(_own(plan.stages, name) for name in trial.kept)
        others = max(
            stage.choice.bytes + again - (_own(plan.stages, stage.part) if stage.part in trial.kept else 0)
            for stage in plan.stages
        )
        if others <= plan.free:
            kept.add(part)
    return frozenset(kept)


def _left_by(before: Sequence[StagePlan], part: str, kept: frozenset[str]) -> int:
    """Bytes that earlier stages have left in memory, besides the part itself."""
    left = {stage.part for stage in before} & kept - {part}
    return sum(_own(before, name) for name in left)


def _own(stages: Sequence[StagePlan], part: str) -> int:
    """What stays in memory of a part that is kept: pages of files are let go of."""
    return max(stage.choice.own for stage in stages if stage.part == part)


def lasting(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 1:
        return "a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def in_words(size: int) -> str:
    """Bytes as people read them."""
    if size >= 10**9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB"
