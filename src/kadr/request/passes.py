"""Which passes a request comes to: their sizes, levels and strengths, known before anything is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kadr.errors import KadrWarning, RequestError
from kadr.models.registry import Release
from kadr.request.request import Request
from kadr.sampling.schedules import Schedule, explicit_sigmas
from kadr.sampling.settings import Pass, StepGuidance
from kadr.sampling.step_cache import MIN_STEPS, StepCache
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid, Size, snap_frames
from kadr.spec.model import Upscaling


@dataclass(frozen=True)
class ResolvedPass:
    """One pass, with nothing left open.

    Args:
        number: 1 or 2.
        settings: as the request and the recipe have it.
        size: in pixels, multiples of 32.
        frames: 8k+1.
        fps: that the positions are made with.
        sigmas: fp32 (S), on the CPU.
        step_guidance: the strengths of each.
        window_index, window_count: which window of how many this is, from 0. Of a pass in windows as a whole: 0, of how many, and
            the levels of its first one.
        first_frame: of the whole video, that is the window's frame 0.
        steps_before, total_steps: steps of the windows before this one, and of all of them.
    """

    number: int
    settings: Pass
    size: Size
    frames: int
    fps: float
    sigmas: Tensor
    step_guidance: tuple[StepGuidance, ...]
    window_index: int = 0
    window_count: int = 1
    first_frame: int = 0
    steps_before: int = 0
    total_steps: int = 0

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid.for_video(self.size, self.frames)

    @property
    def uses_cfg(self) -> bool:
        """Whether any step needs the negative prompt."""
        return any(step.cfg_scale > 1 for step in self.step_guidance)

    def clip_frame_indices(self, video_fps: float | None, clip_frames: int) -> list[int]:
        """Which frames of a clip this makes, or follows: every second one, where it makes only those.

        Args:
            video_fps: of the video.
            clip_frames: frames of the clip; its last one is repeated where it ends before.
        """
        step = 1 if self.fps == video_fps else 2
        return [min(self.first_frame + step * place, clip_frames - 1) for place in range(self.frames)]


def resolve_passes(
    request: Request, schedules: Sequence[Schedule], *, upscaling: Upscaling
) -> tuple[ResolvedPass, ...]:
    """The passes of a request in which nothing is open that has a default.

    Args:
        schedules: of the first pass and of the second.
        upscaling: what the upscalers at hand do.

    Raises:
        RequestError: levels that the model does not allow, too few steps, or a size too small for two passes.
    """
    assert isinstance(request.size, Size)
    assert request.frames is not None
    assert request.fps is not None
    size, frames, first = request.size.snap(), snap_frames(request.frames), request.first_pass()
    if request.windows is not None:
        return (replace(resolve_window_passes(request, schedules[0])[0], frames=frames),)
    if not request.multi_scale:
        return (_resolve_pass(1, first, size, frames, request.fps, schedules[0], _max_first_sigma(request)),)
    assert request.second_pass is not None
    assert request.downscale_factor is not None
    small, made = _two_pass_sizes(request.size, request.downscale_factor) if upscaling.spatial else (size, size)
    few, many = _two_pass_frames(frames) if upscaling.temporal else (frames, frames)
    rate = request.fps / 2 if upscaling.temporal else request.fps
    return (
        _resolve_pass(1, first, small, few, rate, schedules[0], _max_first_sigma(request)),
        _resolve_pass(2, request.second_pass, made, many, request.fps, schedules[1], None),
    )


def resolve_window_passes(request: Request, schedule: Schedule) -> tuple[ResolvedPass, ...]:
    """The windows of a request in which nothing is open, each as a pass of its own; none where there are none.

    Raises:
        RequestError: as `resolve_passes`.
    """
    if request.windows is None:
        return ()
    assert isinstance(request.size, Size)
    assert request.frames is not None
    assert request.fps is not None
    size, spans = request.size.snap(), request.windows.spans(request.frames)
    made: dict[int, ResolvedPass] = {}  # by frames: all but the last are alike
    for span in spans:
        if span.frames not in made:
            made[span.frames] = _resolve_pass(
                1, request.first_pass(), size, span.frames, request.fps, schedule, _max_first_sigma(request)
            )
    plans = [made[span.frames] for span in spans]  # of a schedule that depends on tokens, the last may have more steps
    counts = [len(plan.sigmas) for plan in plans]
    return tuple(
        replace(
            plan,
            window_index=number,
            window_count=len(spans),
            first_frame=span.first_frame,
            steps_before=sum(counts[:number]),
            total_steps=sum(counts),
        )
        for number, (plan, span) in enumerate(zip(plans, spans, strict=True))
    )


def noise_stream_name(resolved_pass: ResolvedPass, name: str) -> str:
    """The stream of noise of a pass or window: the second pass, and each later window, has streams of its own."""
    return f"second {name}" if resolved_pass.number > 1 else window_stream_name(name, resolved_pass.window_index)


def window_stream_name(name: str, window_index: int) -> str:
    """The stream of a window, from 0."""
    return f"window {window_index + 1} {name}" if window_index else name


def _max_first_sigma(request: Request) -> float | None:
    """The highest level that a sampling from a video may begin at."""
    return None if request.input_video is None else request.denoise_strength


def _resolve_pass(
    number: int, settings: Pass, size: Size, frames: int, fps: float, schedule: Schedule, max_sigma: float | None
) -> ResolvedPass:
    levels = _pass_sigmas(settings, schedule, LatentGrid.for_video(size, frames).num_tokens)
    if max_sigma is not None:
        kept = levels[levels <= max_sigma + 1e-6]
        if not len(kept):
            least = math.ceil(float(levels[-1]) * 1e4) / 1e4  # not rounded below the level, or giving it would not help
            raise RequestError(
                f"video_strength is {max_sigma:g}, below every noise level of this model; the least is {least:g}. "
                "Give at least that, or more steps."
            )
        levels = kept
    strengths = tuple(settings.guidance.at_sigma(float(level)) for level in levels)
    return ResolvedPass(number, settings, size, frames, fps, levels, strengths)


def _pass_sigmas(settings: Pass, schedule: Schedule, tokens: int) -> Tensor:
    if settings.sigmas is not None:
        return schedule.check_allowed(explicit_sigmas(settings.sigmas))
    assert settings.steps is not None
    skipped = {"skip_initial": settings.skip_initial, "skip_final": settings.skip_final}
    return schedule.get_sigmas(settings.steps, tokens=tokens, **skipped)


def _two_pass_sizes(requested_size: Size, downscale: float) -> tuple[Size, Size]:
    """The sizes of two passes. The second has twice the sides of the first, which need not be those asked for."""
    size = requested_size.snap()
    width, height = (
        int(side * downscale) // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION for side in (size.width, size.height)
    )
    if min(width, height) < SPATIAL_COMPRESSION:
        raise RequestError(
            f"{requested_size} is too small for two passes: the first would be made at {width}x{height}. "
            f"Ask for a larger size, or for a single pass."
        )
    return Size(width, height), Size(2 * width, 2 * height)


def _two_pass_frames(frames: int) -> tuple[int, int]:
    """The frames of two passes, the second with twice the groups of eight."""
    groups = -(-((frames - 1) // TEMPORAL_COMPRESSION) // 2)
    return groups * TEMPORAL_COMPRESSION + 1, 2 * groups * TEMPORAL_COMPRESSION + 1


def check_skip_blocks(resolved_pass: ResolvedPass, num_layers: int) -> None:
    """Refuse a skipped block that the transformer does not have, where it would be skipped.

    Raises:
        RequestError: with the block and the last there is.
    """
    asked = {block for step in resolved_pass.step_guidance if step.stg_scale > 0 for block in step.skip_blocks}
    if strange := sorted(block for block in asked if block >= num_layers):
        raise RequestError(
            f"skip_blocks has {', '.join(map(str, strange))}; this model has {num_layers} blocks, 0 to {num_layers - 1}."
        )


def check_first_sigma(resolved_pass: ResolvedPass, *, has_init_latents: bool) -> None:
    """Refuse a first level that does not fit what the first pass begins from.

    Args:
        has_init_latents: there is a video or latents to start from.

    Raises:
        RequestError: levels are left out and there is nothing to start from, or nothing of it would stay.
    """
    if not has_init_latents and resolved_pass.settings.skip_initial:
        raise RequestError(
            f"skip_initial is {resolved_pass.settings.skip_initial}, but there is nothing to start from. Leave it out, or give "
            "a video."
        )
    if has_init_latents and float(resolved_pass.sigmas[0]) >= 1:
        raise RequestError(
            "there is a video or latents to start from, but the first level is 1: nothing of them would stay. "
            "Give a video strength below 1, or leave out levels at the front."
        )


def warn_distilled_guidance(
    resolved_pass: ResolvedPass, name: str, schedule: Schedule, release: Release | None
) -> None:
    """Say where guidance is asked of a model that was made to run without."""
    distilled = schedule.allowed_sigmas is not None or (release is not None and release.is_distilled)
    if distilled and resolved_pass.uses_cfg:
        warnings.warn(
            f"guidance is above 1, and {name} is distilled: it was made to run without, and guidance makes its colours "
            "glaring. Leave it out.",
            KadrWarning,
            stacklevel=2,
        )


def unused_second_pass_options(
    *, has_upscaler: bool, has_second_model: bool, has_second_lora_strength: bool = False
) -> tuple[str, ...]:
    """What was named for a second pass, in words. strength: of a LoRA."""
    return (
        *(["the upscaler"] * has_upscaler),
        *(["the model"] * has_second_model),
        *(["the strength of a LoRA"] * has_second_lora_strength),
    )


def warn_unused_second_pass(request: Request, unused: Sequence[str]) -> None:
    """Say what was named for a second pass that is not made. unused: see `unused_second_pass_options`."""
    if unused and not request.multi_scale:
        warnings.warn(
            f"a single pass is made, and {' and '.join(unused)} given for a second is not used. Ask for two passes "
            "with --multi-scale, or leave it out.",
            KadrWarning,
            stacklevel=2,
        )


def warn_step_cache(resolved_pass: ResolvedPass, step_cache: StepCache | None) -> None:
    """Say where a step cache is asked of a pass that gains little by it."""
    if step_cache is not None and len(resolved_pass.sigmas) < MIN_STEPS:
        warnings.warn(
            f"steps are cached, and pass {resolved_pass.number} has {len(resolved_pass.sigmas)}: with fewer than {MIN_STEPS} that costs "
            "quality and saves little time. Leave it out, or give more steps.",
            KadrWarning,
            stacklevel=2,
        )
