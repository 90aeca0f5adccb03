"""Chooses a placement for every stage: the best one that fits into free memory.

Stages run one after the other, so each has all free memory, less the components that stay cached. Nothing is loaded
and nothing is measured here. What each stage can choose from is listed by `planning.planner`; what happens when a stage
runs out of memory in spite of its plan is in `pipeline.retry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kadr.errors import PlanError
from kadr.planning.placement import StageOptions
from kadr.planning.plan import Plan, StagePlan, cached_component_bytes, format_bytes


def make_plan(
    stage_options: Sequence[StageOptions], *, device: str, base_bytes: int, free_bytes: int, free_host_bytes: int
) -> Plan:
    """Chooses for each stage the first placement that fits, and the components that stay cached.

    Args:
        base_bytes, free_bytes: see `Plan`.
        free_host_bytes: bytes that are free on the host, where the device has its own memory.

    Raises:
        PlanError: no placement of a stage fits; carries the shortfall in bytes.
    """
    chosen: dict[str, int] = {}  # component -> index of its placement: all stages of a module share one
    for options in stage_options:
        fitting = [
            index
            for index, placement in enumerate(options.placements)
            if placement.device_bytes <= free_bytes
            and placement.host_bytes + placement.spare_host_bytes <= free_host_bytes
        ]
        if not fitting:
            raise _does_not_fit_error(options, free_bytes, free_host_bytes, device)
        chosen[options.component] = max(chosen.get(options.component, 0), fitting[0])
    stages = [_stage_plan(options, chosen[options.component]) for options in stage_options]
    plan = Plan(device=device, base_bytes=base_bytes, free_bytes=free_bytes, stages=tuple(stages))
    return replace(plan, cached_components=_choose_cached(plan))


def _stage_plan(options: StageOptions, index: int) -> StagePlan:
    return StagePlan(
        stage=options.stage,
        component=options.component,
        placement=options.placements[index],
        fallbacks=options.placements[index + 1 :],
        rejected_placement=options.placements[0] if index else None,
    )


def _does_not_fit_error(options: StageOptions, free_bytes: int, free_host_bytes: int, device: str) -> PlanError:
    """Returns the error of a stage that fits nowhere, about the placement that lacks the fewest bytes."""
    smallest = min(
        options.placements,
        key=lambda placement: max(placement.device_bytes - free_bytes, placement.host_bytes - free_host_bytes),
    )
    if smallest.device_bytes - free_bytes >= smallest.host_bytes - free_host_bytes:
        needed, available, memory = smallest.device_bytes, free_bytes, device
    else:
        needed, available, memory = smallest.host_bytes, free_host_bytes, "the host"
    return PlanError(
        f"{options.stage} needs at least {format_bytes(needed)} on {memory}, and {format_bytes(available)} are free: "
        f"{format_bytes(needed - available)} are missing.",
        shortfall=needed - available,
    )


def _choose_cached(plan: Plan) -> frozenset[str]:
    """Chooses the components that stay in memory: the largest first, as long as every stage still fits."""
    sizes = {stage.component: stage.placement.private_bytes + stage.placement.mapped_bytes for stage in plan.stages}
    cached: set[str] = set()
    for component in sorted(sizes, key=sizes.__getitem__, reverse=True):
        trial = replace(plan, cached_components=frozenset(cached | {component}))
        if _cached_peak_bytes(trial) <= plan.free_bytes:
            cached.add(component)
    return frozenset(cached)


def _cached_peak_bytes(plan: Plan) -> int:
    """Returns the peak bytes of a second request: it begins with all cached components in memory."""
    cached_bytes = {name: cached_component_bytes(plan.stages, name) for name in plan.cached_components}
    total = sum(cached_bytes.values())
    return max(stage.placement.device_bytes + total - cached_bytes.get(stage.component, 0) for stage in plan.stages)
