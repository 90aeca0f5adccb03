"""Resolved passes of a request, known before anything is loaded, and the checks on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

from kadr.errors import KadrWarning, RequestError
from kadr.models.registry import Release
from kadr.request.request import Request
from kadr.request.windows import Span
from kadr.sampling.samplers import EULER, SAMPLERS
from kadr.sampling.schedules import Schedule, explicit_sigmas
from kadr.sampling.settings import Pass, StepGuidance
from kadr.sampling.step_cache import MIN_STEPS, StepCache
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid, Size, snap_frames
from kadr.spec.model import Upscaling

T = TypeVar("T")


class Evaluation(NamedTuple):
    """One call of the denoiser: its sigma, and the guidance there."""

    sigma: float
    guidance: StepGuidance


@dataclass(frozen=True)
class ResolvedPass:
    """A pass with nothing left open: its size, sigmas, and guidance of every evaluation.

    Args:
        number: 1 or 2.
        settings: of the request and the recipe.
        size: in pixels, multiples of 32.
        frames: 8k+1.
        fps: frame rate of the positions.
        sigmas: fp32 values, decreasing, without the final 0.
        evaluations: calls of the denoiser, step by step: a sampler may have several in a step.
        window_index, window_count: index of the window, from 0, and number of windows. For a pass in windows as a
            whole: 0, the number of windows, and the sigmas of the first one.
        first_frame: pixel frame of the whole video that is the window's frame 0.
        steps_before, total_steps: steps of the windows before this one, and of all of them.
    """

    number: int
    settings: Pass
    size: Size
    frames: int
    fps: float
    sigmas: tuple[float, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    window_index: int = 0
    window_count: int = 1
    first_frame: int = 0
    steps_before: int = 0
    total_steps: int = 0

    @property
    def grid(self) -> LatentGrid:
        """Latent grid of the pass."""
        return LatentGrid.for_video(self.size, self.frames)

    @property
    def step_guidance(self) -> tuple[StepGuidance, ...]:
        """Guidance of each step, at the sigma that it begins from."""
        return tuple(step[0].guidance for step in self.evaluations)

    @property
    def evaluation_guidance(self) -> tuple[StepGuidance, ...]:
        """Guidance of every call of the denoiser, in their order."""
        return tuple(evaluation.guidance for step in self.evaluations for evaluation in step)

    @property
    def uses_cfg(self) -> bool:
        """True if any evaluation needs the negative prompt."""
        return any(guidance.cfg_scale > 1 for guidance in self.evaluation_guidance)

    def clip_frame_indices(self, video_fps: float | None, clip_frames: int) -> list[int]:
        """Returns the frames of a clip that belong to the pass's frames; every second one, if it samples only those.

        Args:
            video_fps: frame rate of the video.
            clip_frames: number of frames of the clip; its last one is repeated past its end.
        """
        step = 1 if self.fps == video_fps else 2
        return [min(self.first_frame + step * frame, clip_frames - 1) for frame in range(self.frames)]


def resolve_passes(
    request: Request, schedules: Sequence[Schedule], *, upscaling: Upscaling
) -> tuple[ResolvedPass, ...]:
    """Returns the passes of a resolved request.

    Args:
        schedules: of the first pass and of the second.
        upscaling: what the available upscalers double.

    Raises:
        RequestError: the model does not allow the sigmas, there are too few steps, the size is too small for two
            passes, or a step cache does not fit the sampler.
    """
    _refuse_step_cache(request)
    requested_size, fps, first = known_size(request), known(request.fps), request.first_pass()
    size, frames = requested_size.snap(), snap_frames(known(request.frames))
    if request.windows is not None:
        return (replace(resolve_window_passes(request, schedules[0])[0], frames=frames),)
    if not request.multi_scale:
        return (_resolve_pass(1, first, size, frames, fps, schedules[0], _max_first_sigma(request)),)
    first_size, second_size = (
        _two_pass_sizes(requested_size, known(request.downscale_factor)) if upscaling.spatial else (size, size)
    )
    first_frames, second_frames = _two_pass_frames(frames) if upscaling.temporal else (frames, frames)
    first_fps = fps / 2 if upscaling.temporal else fps
    return (
        _resolve_pass(1, first, first_size, first_frames, first_fps, schedules[0], _max_first_sigma(request)),
        _resolve_pass(2, known(request.second_pass), second_size, second_frames, fps, schedules[1], None),
    )


def _refuse_step_cache(request: Request) -> None:
    """Refuses a step cache together with a sampler that evaluates the model more than once in a step.

    Raises:
        RequestError: both are requested.
    """
    passes = filter(None, (request.first_pass(), request.second_pass))
    for sampler in (settings.sampler or EULER for settings in passes):
        count = len(SAMPLERS[sampler].evaluation_sigmas(1.0, 0.5))
        if request.step_cache is not None and count > 1:
            raise RequestError(
                f"the step cache is {request.step_cache.kind!r}, and the sampler {sampler!r} has {count} evaluations "
                f"in a step; a step cache allows 1. Leave out the cache, or use the sampler {EULER!r}."
            )


def resolve_window_passes(request: Request, schedule: Schedule) -> tuple[ResolvedPass, ...]:
    """Returns the windows of a resolved request, each as a pass; none if the request has no windows.

    Raises:
        RequestError: as `resolve_passes`.
    """
    spans = window_spans(request)
    if not spans:
        return ()
    size, fps = known_size(request).snap(), known(request.fps)
    by_frames: dict[int, ResolvedPass] = {}  # all windows but the last have the same length
    for span in spans:
        if span.frames not in by_frames:
            by_frames[span.frames] = _resolve_pass(
                1, request.first_pass(), size, span.frames, fps, schedule, _max_first_sigma(request)
            )
    # If the schedule depends on the number of tokens, the last window may have more steps.
    passes = [by_frames[span.frames] for span in spans]
    counts = [len(window_pass.sigmas) for window_pass in passes]
    return tuple(
        replace(
            window_pass,
            window_index=index,
            window_count=len(spans),
            first_frame=span.first_frame,
            steps_before=sum(counts[:index]),
            total_steps=sum(counts),
        )
        for index, (window_pass, span) in enumerate(zip(passes, spans, strict=True))
    )


def window_spans(request: Request) -> tuple[Span, ...]:
    """Returns the windows of a completed request; () for a video in one piece."""
    return () if request.windows is None else request.windows.spans(known(request.frames))


def known(value: T | None) -> T:
    """Returns a field of a request that `request.complete.complete_request` has filled."""
    assert value is not None
    return value


def known_size(request: Request) -> Size:
    """Returns the size of a request; a pair that it was given as is a `Size` since its creation."""
    assert isinstance(request.size, Size)
    return request.size


def noise_stream_name(resolved_pass: ResolvedPass, name: str) -> str:
    """Returns the name of a pass's or window's noise stream: the second pass and later windows have their own."""
    return f"second {name}" if resolved_pass.number > 1 else window_stream_name(name, resolved_pass.window_index)


def window_stream_name(name: str, window_index: int) -> str:
    """Returns the name of a window's noise stream; `window_index` counts from 0."""
    return f"window {window_index + 1} {name}" if window_index else name


def _max_first_sigma(request: Request) -> float | None:
    """Returns the highest sigma that sampling from an input video may begin at."""
    return None if request.input_video is None else request.denoise_strength


def _resolve_pass(
    number: int, settings: Pass, size: Size, frames: int, fps: float, schedule: Schedule, max_sigma: float | None
) -> ResolvedPass:
    sigmas = _pass_sigmas(settings, schedule, LatentGrid.for_video(size, frames).num_tokens)
    if max_sigma is not None:
        allowed_sigmas = tuple(sigma for sigma in sigmas if sigma <= max_sigma + 1e-6)
        if not allowed_sigmas:
            lowest = math.ceil(sigmas[-1] * 1e4) / 1e4  # rounded up: below the sigma, it would not help
            raise RequestError(
                f"denoise_strength is {max_sigma:g}, below every sigma of the schedule; the lowest is {lowest:g}. "
                "Give at least that, or more steps."
            )
        sigmas = allowed_sigmas
    evaluations = _evaluations(settings, sigmas)
    if schedule.allowed_sigmas is not None and any(len(step) > 1 for step in evaluations):
        raise RequestError(
            f"this model was distilled for the sigmas {', '.join(map(str, schedule.allowed_sigmas))}; the sampler "
            f"{settings.sampler!r} evaluates it between them. Use the sampler {EULER!r}."
        )
    return ResolvedPass(number, settings, size, frames, fps, sigmas, evaluations)


def _evaluations(settings: Pass, sigmas: Sequence[float]) -> tuple[tuple[Evaluation, ...], ...]:
    """Returns the evaluations of each step: the sampler says at which sigmas they are."""
    sampler = SAMPLERS[settings.sampler or EULER]
    return tuple(
        tuple(Evaluation(sigma, settings.guidance.at_sigma(sigma)) for sigma in sampler.evaluation_sigmas(*step))
        for step in pairwise([*sigmas, 0.0])
    )


def _pass_sigmas(settings: Pass, schedule: Schedule, tokens: int) -> tuple[float, ...]:
    if settings.sigmas is not None:
        return tuple(schedule.check_allowed(explicit_sigmas(settings.sigmas)).tolist())
    skipped = {"skip_initial": settings.skip_initial, "skip_final": settings.skip_final}
    return tuple(schedule.get_sigmas(known(settings.steps), tokens=tokens, **skipped).tolist())


def _two_pass_sizes(requested_size: Size, downscale_factor: float) -> tuple[Size, Size]:
    """Returns the sizes of two passes. The second has twice the sides of the first, not always the requested ones."""
    size = requested_size.snap()
    width, height = (
        int(side * downscale_factor) // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION for side in (size.width, size.height)
    )
    if min(width, height) < SPATIAL_COMPRESSION:
        raise RequestError(
            f"{requested_size} is too small for two passes: the first would be sampled at {width}x{height}. "
            "Ask for a larger size, or for a single pass (--single-pass)."
        )
    return Size(width, height), Size(2 * width, 2 * height)


def _two_pass_frames(frames: int) -> tuple[int, int]:
    """Returns the frames of two passes; the second has twice as many groups of eight."""
    groups = -(-((frames - 1) // TEMPORAL_COMPRESSION) // 2)
    return groups * TEMPORAL_COMPRESSION + 1, 2 * groups * TEMPORAL_COMPRESSION + 1


def check_skip_blocks(resolved_pass: ResolvedPass, num_layers: int) -> None:
    """Refuses a skipped block that the transformer does not have, if an evaluation would skip it.

    Raises:
        RequestError: a block is past the last one.
    """
    skipped = {block for step in resolved_pass.evaluation_guidance if step.stg_scale > 0 for block in step.skip_blocks}
    if unknown := sorted(block for block in skipped if block >= num_layers):
        raise RequestError(
            f"skip_blocks has {', '.join(map(str, unknown))}; this model has {num_layers} blocks, 0 to "
            f"{num_layers - 1}."
        )


def check_first_sigma(resolved_pass: ResolvedPass, *, has_init_latents: bool) -> None:
    """Refuses a first sigma that does not fit what the first pass starts from.

    Args:
        has_init_latents: whether there is an input video or initial latents.

    Raises:
        RequestError: initial steps are skipped without anything to start from, or nothing of it would remain.
    """
    if not has_init_latents and resolved_pass.settings.skip_initial:
        raise RequestError(
            f"skip_initial is {resolved_pass.settings.skip_initial}, but there is nothing to start from. Leave it out, "
            "or give an input video."
        )
    if has_init_latents and resolved_pass.sigmas[0] >= 1:
        raise RequestError(
            "there is an input video or initial latents, but the first sigma is 1: nothing of them would remain. "
            "Give a denoise strength below 1, or skip initial steps."
        )


def warn_distilled_guidance(
    resolved_pass: ResolvedPass, name: str, release: Release | None, schedule: Schedule
) -> None:
    """Warns where guidance is requested of a distilled model.

    Args:
        name, release: of the model; see `spec.model.ModelSpec.names_and_releases`.
    """
    is_distilled = schedule.allowed_sigmas is not None or (release is not None and release.is_distilled)
    if is_distilled and resolved_pass.uses_cfg:
        message = (
            f"guidance is above 1, but {name} is distilled: it was made to run without guidance, which oversaturates "
            "its colours. Leave it out."
        )
        fix = "--guidance 1" if resolved_pass.number == 1 else "--second-guidance 1"
        warnings.warn(KadrWarning(message, topic="guidance", fix=fix), stacklevel=2)


def unused_second_pass_options(
    *, has_upscaler: bool, has_second_model: bool, has_second_lora_strength: bool = False
) -> tuple[str, ...]:
    """Returns the names, in words, of the options that only a second pass uses."""
    return (
        *(["the upscaler"] * has_upscaler),
        *(["the model"] * has_second_model),
        *(["the strength of a LoRA"] * has_second_lora_strength),
    )


def warn_unused_second_pass(request: Request, unused: Sequence[str]) -> None:
    """Warns of options for a second pass where there is a single one.

    Args:
        unused: see `unused_second_pass_options`.
    """
    if unused and not request.multi_scale:
        message = (
            f"a single pass is run, and {' and '.join(unused)} given for a second is not used. Ask for two passes "
            "with --multi-scale, or leave it out."
        )
        warnings.warn(KadrWarning(message, topic="passes", fix="--multi-scale"), stacklevel=2)


def warn_step_cache(resolved_pass: ResolvedPass, step_cache: StepCache | None) -> None:
    """Warns where a pass is too short to gain from a step cache."""
    if step_cache is not None and len(resolved_pass.sigmas) < MIN_STEPS:
        message = (
            f"a step cache is given, and pass {resolved_pass.number} has {len(resolved_pass.sigmas)} steps: with fewer "
            f"than {MIN_STEPS} it costs quality and saves little time. Leave it out, or give more steps."
        )
        warnings.warn(KadrWarning(message, topic="step cache", fix="--cache none"), stacklevel=2)
