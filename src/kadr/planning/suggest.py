"""What would fit in memory where a request does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace

from kadr.errors import PlanError
from kadr.planning.planner import Planner
from kadr.planning.workload import WindowWorkload, Workload
from kadr.quant.weight_formats import INT8
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, Size, snap_frames
from kadr.spec.model import ModelSpec
from kadr.spec.offload import OFFLOAD_AUTO
from kadr.spec.weights import is_quantized

Fits = Callable[[ModelSpec, Workload], bool]


def suggest_smaller(spec: ModelSpec, workload: Workload, request: Request, *, cached: int = 0) -> str:
    """What would fit where a request does not: a setting, and the nearest smaller request. As advice, in words.

    Args:
        cached: as of `Planner`.
    """

    def fits(spec: ModelSpec, work: Workload) -> bool:
        return _fits(Planner(spec, work, cached=cached))

    ways = [words for words, other in _lighter_settings(spec) if fits(other, workload)]
    smaller = _shorter_window(spec, workload, request, fits) or _smaller_request(spec, workload, request, fits)
    if smaller is not None:
        ways.append(smaller)
    if not ways:
        return "Nothing smaller fits either: close other programs, or use a machine with more memory."
    return f"What would fit: {'; '.join(ways)}."


def _fits(planner: Planner) -> bool:
    try:
        planner.plan()
    except PlanError:
        return False
    return True


def _lighter_settings(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """Settings that take less memory, each with the spec under it."""
    for words, changed in (
        ("--offload auto", {"offload": OFFLOAD_AUTO, "quant": spec.quant}),
        ("--quant int8", {"offload": spec.offload, "quant": INT8}),
        ("--offload auto --quant int8", {"offload": OFFLOAD_AUTO, "quant": INT8}),
    ):
        quantized = any(is_quantized(one.sources["transformer"]) for one in spec.transformer_checkpoints)
        if changed["quant"] != spec.quant and quantized:
            continue
        other = copy(spec)
        other.offload, other.quant = changed["offload"], changed["quant"]
        if (other.offload, other.quant) != (spec.offload, spec.quant):
            yield words, other


def _shorter_window(spec: ModelSpec, workload: Workload, request: Request, fits: Fits) -> str | None:
    """The longest window with which a long video fits."""
    if request.windows is None:
        return None
    assert request.windows.frames is not None
    assert request.windows.overlap is not None
    for frames in range(request.windows.frames - TEMPORAL_COMPRESSION, request.windows.overlap, -TEMPORAL_COMPRESSION):
        windows = tuple(
            replace(
                window, resolved_pass=replace(window.resolved_pass, frames=min(window.resolved_pass.frames, frames))
            )
            for window in workload.windows[:2]
        )
        if fits(spec, replace(workload, windows=windows)):
            return f"--window {frames}"
    return None


def _smaller_request(spec: ModelSpec, workload: Workload, request: Request, fits: Fits) -> str | None:
    """The nearest request that fits: fewer frames of this size, or else a smaller size with them."""
    for size, frames in _smaller_sizes(request):
        passes = tuple(_resize_pass(plan, size, frames, request) for plan in workload.passes)
        windows = tuple(_resize_window(window, size, request) for window in workload.windows)
        if fits(spec, replace(workload, passes=passes, windows=windows)):
            return f"--size {size} --frames {frames}"
    return None


def _smaller_sizes(request: Request) -> Iterator[tuple[Size, int]]:
    assert isinstance(request.size, Size)
    assert request.frames is not None
    size, frames = request.size, request.frames
    if request.windows is None:
        for count in range(snap_frames(frames) - TEMPORAL_COMPRESSION, frames // 2, -TEMPORAL_COMPRESSION):
            yield size, count
    for step in range(19, 4, -1):
        smaller = Size(
            *(
                max(SPATIAL_COMPRESSION, side * step // 20 // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION)
                for side in (size.width, size.height)
            )
        )
        # Of a long video the number of windows costs no memory.
        for count in (frames, snap_frames(max(1, frames // 2)), 1) if request.windows is None else (frames,):
            yield smaller, count


def _resize_window(window: WindowWorkload, size: Size, request: Request) -> WindowWorkload:
    assert request.frames is not None
    plan = _resize_pass(window.resolved_pass, size, request.frames, request)
    before = window.resolved_pass.grid.num_tokens
    extra, context = (
        tokens * plan.grid.num_tokens // before for tokens in (window.condition_tokens, window.reference_tokens)
    )
    return replace(window, resolved_pass=plan, condition_tokens=extra, reference_tokens=context)


def _resize_pass(resolved_pass: ResolvedPass, size: Size, frames: int, request: Request) -> ResolvedPass:
    """A pass of a smaller request: smaller by as much."""
    assert isinstance(request.size, Size)
    sides = (
        max(SPATIAL_COMPRESSION, own * new // old // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION)
        for own, new, old in (
            (resolved_pass.size.width, size.width, request.size.width),
            (resolved_pass.size.height, size.height, request.size.height),
        )
    )
    assert request.frames is not None
    return replace(
        resolved_pass, size=Size(*sides), frames=snap_frames(max(1, resolved_pass.frames * frames // request.frames))
    )
