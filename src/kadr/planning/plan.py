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
class Placement:
    """One way to run a stage.

    Args:
        dtype: that is computed in: "bfloat16" or "float32".
        weight_format: "as stored" (converted while it is used), "converted" when it is loaded, or one of
            `quant.weight_formats`.
        streamed_blocks: how many blocks are in memory only while they run.
        chunk_frames: that the decoder's stages hand on at a time; 0 for other stages.
        winograd_frames: frames that packed convolutions make at a time; 0 where none are packed.
        mapped_bytes, private_bytes: bytes of weights in memory at once, on the device: in the pages of files, which can be let go of
            at any time, and others.
        workspace_bytes: bytes besides: activations, buffers.
        host_bytes: bytes on the host, where the device is another.
        seconds: about.
        window_count: of a long video, in how many it is made; 0 where it is made at once.
        backend: what its products are computed by, of the ways there are, in words.
        reason: what speaks for it or made it necessary; "" for the plain way.
    """

    dtype: str
    weight_format: str = CONVERTED
    streamed_blocks: int = 0
    chunk_frames: int = 0
    winograd_frames: int = 0
    mapped_bytes: int = 0
    private_bytes: int = 0
    workspace_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    window_count: int = 0
    backend: str = "torch"
    reason: str = ""

    @property
    def device_bytes(self) -> int:
        """At the stage's peak, on the device."""
        return self.mapped_bytes + self.private_bytes + self.workspace_bytes


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """A stage before anything is decided.

    Args:
        stage: "text", "encode", "denoise", "upscale", "refine" or "decode".
        component: the module, as the shelf names it.
        placements: the ways to run it, best first.
    """

    stage: str
    component: str
    placements: tuple[Placement, ...]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage, decided.

    Args:
        fallbacks: the ways that were left, for when memory runs out in spite of the plan.
        rejected_placement: the first way that did not fit, where the chosen one is not the best.
    """

    stage: str
    component: str
    placement: Placement
    fallbacks: tuple[Placement, ...] = ()
    rejected_placement: Placement | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is in memory when, and how long it takes.

    Args:
        device: such as "cpu" or "cuda:0".
        base_bytes: bytes that the process takes without any of this.
        free_bytes: bytes that the run may take, on the device.
        stages: in the order they run.
        cached_components: parts that stay in memory for the next request.
    """

    device: str
    base_bytes: int
    free_bytes: int
    stages: tuple[StagePlan, ...]
    cached_components: frozenset[str] = frozenset()

    @property
    def peak_bytes(self) -> int:
        """Of the whole process at its worst moment; of the device's memory, where that is another."""
        return self.base_bytes + max((self.stage_bytes(stage) for stage in self.stages), default=0)

    @property
    def seconds(self) -> float:
        return sum(stage.placement.seconds for stage in self.stages)

    def stage_bytes(self, stage: StagePlan) -> int:
        """What a stage takes at its peak, with what the stages before have left in memory."""
        return stage.placement.device_bytes + _cached_bytes(
            self.stages[: self.stages.index(stage)], stage.component, self.cached_components
        )

    def stage(self, name: str) -> StagePlan:
        """The plan of the stage of that name."""
        return next(each for each in self.stages if each.stage == name)

    def with_fallback(self, stage: str) -> Plan | None:
        """The plan with the next way down for a stage, one that takes less; None where there is none."""
        now = self.stage(stage)
        smaller = [choice for choice in now.fallbacks if choice.device_bytes < now.placement.device_bytes]
        if not smaller:
            return None
        rest = now.fallbacks[now.fallbacks.index(smaller[0]) + 1 :]
        changed = replace(now, placement=smaller[0], fallbacks=rest, rejected_placement=now.placement)
        return replace(
            self, stages=tuple(changed if each is now else each for each in self.stages), cached_components=frozenset()
        )

    def reasons(self) -> list[str]:
        """Why it is done so, stage by stage, where it is not the plain way."""
        told = []
        for stage in self.stages:
            why = stage.placement.reason
            if stage.rejected_placement is not None:
                lacking = f"{format_bytes(stage.rejected_placement.device_bytes)} do not fit into {format_bytes(self.free_bytes)}"
                why = f"{why}, because {lacking}" if why else lacking
            if why:
                told.append(f"{stage.stage}: {why}")
            if stage.placement.window_count:
                told.append(f"{stage.stage}: {stage.placement.window_count} windows, one after the other")
        return told

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "device": self.device,
            "free_bytes": self.free_bytes,
            "base_bytes": self.base_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 1),
            "cached_components": sorted(self.cached_components),
            "reasons": self.reasons(),
            "stages": [
                {
                    "stage": stage.stage,
                    "part": stage.component,
                    "dtype": stage.placement.dtype,
                    "hold": stage.placement.weight_format,
                    "path": stage.placement.backend,
                    "streamed_blocks": stage.placement.streamed_blocks,
                    "windows": stage.placement.window_count,
                    "weight_bytes": stage.placement.mapped_bytes + stage.placement.private_bytes,
                    "working_bytes": stage.placement.workspace_bytes,
                    "host_bytes": stage.placement.host_bytes,
                    "peak_bytes": self.base_bytes + self.stage_bytes(stage),
                    "seconds": round(stage.placement.seconds, 1),
                }
                for stage in self.stages
            ],
        }

    def __str__(self) -> str:
        rows = [("stage", "part", "held", "by", "peak", "about")]
        for stage in self.stages:
            peak = format_bytes(self.base_bytes + self.stage_bytes(stage))
            way = describe_weights(stage.placement), stage.placement.backend
            rows.append((stage.stage, stage.component, *way, peak, format_seconds(stage.placement.seconds)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary(), *self.reasons()])

    def summary(self) -> str:
        """The plan in one line."""
        return (
            f"peak {format_bytes(self.peak_bytes)} on {self.device}, where {format_bytes(self.base_bytes + self.free_bytes)} can be had; "
            f"about {format_seconds(self.seconds)}"
        )


def describe_weights(placement: Placement) -> str:
    """How the weights of a stage are held, in words."""
    words = (
        placement.dtype
        if placement.weight_format in (AS_STORED, CONVERTED)
        else f"{placement.weight_format}, computed in {placement.dtype}"
    )
    if placement.weight_format == AS_STORED:
        words = f"as stored, computed in {placement.dtype}"
    return f"{words}, {placement.streamed_blocks} blocks streamed" if placement.streamed_blocks else words


def make_plan(
    stage_options: Sequence[StageOptions], *, device: str, base_bytes: int, free_bytes: int, free_host_bytes: int
) -> Plan:
    """Choose for each stage the first way that fits.

    Args:
        base_bytes, free_bytes: see `Plan`.
        free_host_bytes: bytes that are free on the host, where the device is another.

    Raises:
        PlanError: a stage has no way that fits; it carries the shortfall.
    """
    taken: dict[str, int] = {}  # part -> the number of its way: a module is held in one way by all who use it
    for need in stage_options:
        fitting = [
            number
            for number, choice in enumerate(need.placements)
            if choice.device_bytes <= free_bytes and choice.host_bytes <= free_host_bytes
        ]
        if not fitting:
            raise _does_not_fit_error(need, free_bytes, free_host_bytes, device)
        taken[need.component] = max(taken.get(need.component, 0), fitting[0])
    stages = [_stage_plan(need, taken[need.component]) for need in stage_options]
    plan = Plan(device=device, base_bytes=base_bytes, free_bytes=free_bytes, stages=tuple(stages))
    return replace(plan, cached_components=_choose_cached(plan))


def _stage_plan(options: StageOptions, index: int) -> StagePlan:
    passed = options.placements[0] if index else None
    rest = options.placements[index + 1 :]
    return StagePlan(
        stage=options.stage,
        component=options.component,
        placement=options.placements[index],
        fallbacks=rest,
        rejected_placement=passed,
    )


def _does_not_fit_error(options: StageOptions, free_bytes: int, free_host_bytes: int, device: str) -> PlanError:
    least = min(
        options.placements,
        key=lambda choice: max(choice.device_bytes - free_bytes, choice.host_bytes - free_host_bytes),
    )
    if least.device_bytes - free_bytes >= least.host_bytes - free_host_bytes:
        asked, there, where = least.device_bytes, free_bytes, device
    else:
        asked, there, where = least.host_bytes, free_host_bytes, "the host"
    return PlanError(
        f"{options.stage} needs {format_bytes(asked)} on {where} at the least, and {format_bytes(there)} are free: "
        f"{format_bytes(asked - there)} are missing.",
        shortfall=asked - there,
    )


def _choose_cached(plan: Plan) -> frozenset[str]:
    """The parts that can stay in memory, the costliest to load first, as long as every stage still fits."""
    parts = {stage.component: stage.placement.private_bytes + stage.placement.mapped_bytes for stage in plan.stages}
    kept: set[str] = set()
    for part in sorted(parts, key=parts.__getitem__, reverse=True):
        trial = replace(plan, cached_components=frozenset(kept | {part}))
        # A second request begins with all of them in memory.
        again = sum(_cached_component_bytes(plan.stages, name) for name in trial.cached_components)
        others = max(
            stage.placement.device_bytes
            + again
            - (
                _cached_component_bytes(plan.stages, stage.component)
                if stage.component in trial.cached_components
                else 0
            )
            for stage in plan.stages
        )
        if others <= plan.free_bytes:
            kept.add(part)
    return frozenset(kept)


def _cached_bytes(earlier_stages: Sequence[StagePlan], component: str, cached_components: frozenset[str]) -> int:
    """Bytes that earlier stages have left in memory, besides the part itself."""
    left = {stage.component for stage in earlier_stages} & cached_components - {component}
    return sum(_cached_component_bytes(earlier_stages, name) for name in left)


def _cached_component_bytes(stages: Sequence[StagePlan], component: str) -> int:
    """What stays in memory of a part that is kept: pages of files are let go of."""
    return max(stage.placement.private_bytes for stage in stages if stage.component == component)


def format_seconds(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 1:
        return "a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_bytes(size: int) -> str:
    """Bytes as people read them."""
    if size >= 10**9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB"
