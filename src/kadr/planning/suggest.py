"""Suggests smaller requests: one that fits into memory, for one that does not, and one that takes less than an hour."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from kadr.errors import KadrWarning, PlanError
from kadr.models.registry import MODEL_RELEASES, Recipe
from kadr.planning.calibration.calibration import Calibration
from kadr.planning.plan import Plan
from kadr.planning.planner import Planner
from kadr.planning.workload import WindowWorkload, Workload
from kadr.quant.weight_formats import INT8
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_request import ResolvedRequest
from kadr.request.windows import Windows
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, Size, snap_frames
from kadr.spec.model import ModelSpec
from kadr.spec.offload import OFFLOAD_AUTO
from kadr.spec.weights import is_quantized

LONG_SECONDS = 3600  # of a generation: one that takes more says so before it begins
Fits = Callable[[ModelSpec, Workload], bool]


@dataclass(frozen=True)
class SmallerRequest:
    """A request that takes less than another one: a smaller size, fewer frames, or shorter windows.

    Args:
        size, frames, windows: fields of a `Request`; None where that of the other one stays.
    """

    size: Size | None = None
    frames: int | None = None
    windows: Windows | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `Request` that differ."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def flags(self) -> str:
        """The flags of `kadr generate` that say the same."""
        flags = {
            "--size": self.size,
            "--frames": self.frames,
            "--window": None if self.windows is None else self.windows.frames,
        }
        return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


@dataclass(frozen=True)
class Suggestions:
    """Ways out for a request that does not fit into memory.

    Args:
        settings: flags of the engine with which it would fit as it is.
        smaller: the nearest smaller request that would fit; None if none does.
    """

    settings: tuple[str, ...] = ()
    smaller: SmallerRequest | None = None

    def __str__(self) -> str:
        flags = [*self.settings, *([] if self.smaller is None else [self.smaller.flags])]
        if not flags:
            return "Nothing smaller fits either: close other programs, or use a machine with more memory."
        return f"These would fit: {'; '.join(flags)}."


def suggest_smaller(
    spec: ModelSpec,
    workload: Workload,
    request: ResolvedRequest,
    calibration: Calibration,
    *,
    cached: int = 0,
    reclaimable: int = 0,
) -> Suggestions:
    """Returns the settings that would fit, and the nearest smaller request that would.

    Args:
        calibration, cached, reclaimable: see `Planner`.
    """

    def fits(spec: ModelSpec, workload: Workload) -> bool:
        return _fits(Planner(spec, workload, calibration, cached=cached, reclaimable=reclaimable))

    settings = tuple(flags for flags, lighter_spec in _lighter_settings(spec) if fits(lighter_spec, workload))
    smaller = _shorter_window(spec, workload, request, fits) or _smaller_request(spec, workload, request, fits)
    return Suggestions(settings, smaller)


def warn_if_long(
    spec: ModelSpec, workload: Workload, request: ResolvedRequest, calibration: Calibration, plan: Plan
) -> None:
    """Warns of a generation that will take over an hour, with what would take less.

    Args:
        calibration: see `Planner`.
        plan: of the workload.
    """
    if plan.seconds <= LONG_SECONDS:
        return
    ways_out = [way for way in (_shorter_request(spec, workload, request, calibration), _distilled(spec)) if way]
    advice = "; ".join(f"{flags} {gain}" for flags, gain in ways_out)
    message = (
        f"this will take {plan.describe_time()}. To shorten it: "
        f"{advice or 'nothing much smaller takes less than an hour on this device'}."
    )
    fix = ", or ".join(flags for flags, _ in ways_out)
    warnings.warn(KadrWarning(message, topic="time", fix=fix), stacklevel=4)


def _shorter_request(
    spec: ModelSpec, workload: Workload, request: ResolvedRequest, calibration: Calibration
) -> tuple[str, str] | None:
    """Returns the flags of the nearest smaller request that takes less than an hour, and its time; None if none."""
    for size, frames in _shorter_sizes(request, spec.recipe):
        if not _keeps_conditions(request, frames):
            continue
        try:
            plan = Planner(spec, _shrink(workload, size, frames, request), calibration).plan()
        except PlanError:
            continue
        if plan.seconds <= LONG_SECONDS:
            return SmallerRequest(size, frames).flags, f"would take {plan.describe_time()}"
    return None


def _shorter_sizes(request: ResolvedRequest, recipe: Recipe) -> Iterator[tuple[Size, int]]:
    """Yields sizes and frame counts that take less time: fewer frames, smaller sizes, and what the model is good at."""
    size, frames = request.size, request.frames
    smaller = size
    counts = [frames * step // 20 for step in range(19, 9, -1)]
    if request.windows is None:
        counts = [snap_frames(count) for count in counts if count > 0]
    counts = [count for count in dict.fromkeys(counts) if 1 < count < frames]
    yield from ((size, count) for count in counts)
    for smaller in _smaller_sides(size):
        yield smaller, frames
        yield from ((smaller, count) for count in counts[-1:])
    while min(smaller.width, smaller.height) >= 2 * max(recipe.size.width, recipe.size.height):
        smaller = Size(smaller.width // 2, smaller.height // 2).snap()
        yield from ((smaller, count) for count in (frames, *counts[-1:]))
    if recipe.size.width <= size.width and recipe.size.height <= size.height and recipe.frames <= frames:
        yield recipe.size, recipe.frames


def _distilled(spec: ModelSpec) -> tuple[str, str] | None:
    """Returns the flag of the model that was distilled from one like this, and its gain; None if there is none."""
    release = spec.release
    if release is None or release.is_distilled:
        return None
    family = (release.repo, release.num_layers)
    names = [other.name for other in MODEL_RELEASES if other.is_distilled and (other.repo, other.num_layers) == family]
    return (f"--model {names[-1].removesuffix('-fp8')}", "takes fewer steps") if names else None


def _fits(planner: Planner) -> bool:
    try:
        planner.plan()
    except PlanError:
        return False
    return True


def _lighter_settings(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """Yields flags that take less memory, each with the spec that has them."""
    is_stored_quantized = any(
        is_quantized(checkpoint.sources["transformer"]) for checkpoint in spec.transformer_checkpoints
    )
    for flags, offload, quant in (
        ("--offload auto", OFFLOAD_AUTO, spec.quant),
        ("--quant int8", spec.offload, INT8),
        ("--offload auto --quant int8", OFFLOAD_AUTO, INT8),
    ):
        if quant != spec.quant and is_stored_quantized:
            continue
        if (offload, quant) != (spec.offload, spec.quant):
            yield flags, replace(spec, offload=offload, quant=quant)


def _shorter_window(spec: ModelSpec, workload: Workload, request: ResolvedRequest, fits: Fits) -> SmallerRequest | None:
    """Returns the longest window with which a long video fits; None if none does."""
    if request.windows is None:
        return None
    length, overlap = request.windows.latent_frames
    for latent_frames in range(length - 1, overlap, -1):
        frames = (latent_frames - 1) * TEMPORAL_COMPRESSION + 1
        windows = tuple(
            replace(
                window, resolved_pass=replace(window.resolved_pass, frames=min(window.resolved_pass.frames, frames))
            )
            for window in workload.windows[:2]
        )
        if fits(spec, replace(workload, windows=windows)):
            return SmallerRequest(windows=replace(request.windows, frames=frames))
    return None


def _smaller_request(
    spec: ModelSpec, workload: Workload, request: ResolvedRequest, fits: Fits
) -> SmallerRequest | None:
    """Returns the nearest request that fits: fewer frames at this size, or else a smaller size."""
    for size, frames in _smaller_sizes(request):
        if _keeps_conditions(request, frames) and fits(spec, _shrink(workload, size, frames, request)):
            return SmallerRequest(size, frames)
    return None


def _keeps_conditions(request: ResolvedRequest, frames: int) -> bool:
    """Tells whether every image and clip that is placed from the front still begins within so many frames."""
    placed = [item.start_frame for item in request.conditions if item.condition.frame >= 0]
    return max(placed, default=0) < frames


def _shrink(workload: Workload, size: Size, frames: int, request: ResolvedRequest) -> Workload:
    """Returns the workload of a smaller request; of a long video, with the windows that so many frames need."""
    passes = tuple(_resize_pass(resolved_pass, size, frames, request) for resolved_pass in workload.passes)
    num_windows = len(request.windows.spans(frames)) if request.windows is not None else 0
    windows = tuple(_resize_window(window, size, request) for window in workload.windows[:num_windows])
    return replace(workload, passes=passes, windows=windows)


def _smaller_sizes(request: ResolvedRequest) -> Iterator[tuple[Size, int]]:
    """Yields smaller sizes and frame counts, the nearest first."""
    size, frames = request.size, request.frames
    if request.windows is None:
        for count in range(snap_frames(frames) - TEMPORAL_COMPRESSION, frames // 2, -TEMPORAL_COMPRESSION):
            yield size, count
    for smaller in _smaller_sides(size):
        # The number of windows of a long video costs no memory.
        for count in (frames, snap_frames(max(1, frames // 2)), 1) if request.windows is None else (frames,):
            yield smaller, count


def _smaller_sides(size: Size) -> Iterator[Size]:
    """Yields sizes of about the same aspect, from 95 % to 25 % of the sides."""
    for step in range(19, 4, -1):
        sides = (side * step // 20 // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION for side in (size.width, size.height))
        yield Size(*(max(SPATIAL_COMPRESSION, side) for side in sides))


def _resize_window(window: WindowWorkload, size: Size, request: ResolvedRequest) -> WindowWorkload:
    resolved_pass = _resize_pass(window.resolved_pass, size, request.frames, request)
    before, after = window.resolved_pass.grid.num_tokens, resolved_pass.grid.num_tokens
    condition_tokens, reference_tokens = (
        tokens * after // before for tokens in (window.condition_tokens, window.reference_tokens)
    )
    return replace(
        window, resolved_pass=resolved_pass, condition_tokens=condition_tokens, reference_tokens=reference_tokens
    )


def _resize_pass(resolved_pass: ResolvedPass, size: Size, frames: int, request: ResolvedRequest) -> ResolvedPass:
    """Scales a pass by the ratio of a smaller request to the original one."""
    sides = (
        max(SPATIAL_COMPRESSION, side * new // old // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION)
        for side, new, old in (
            (resolved_pass.size.width, size.width, request.size.width),
            (resolved_pass.size.height, size.height, request.size.height),
        )
    )
    return replace(
        resolved_pass, size=Size(*sides), frames=snap_frames(max(1, resolved_pass.frames * frames // request.frames))
    )
