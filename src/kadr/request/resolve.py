"""Resolving a request for a model: from the request, the model's spec and the headers of its media alone.

Nothing here loads a weight, decodes a pixel or uses the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kadr.request.complete import complete_request, warn_single_pass
from kadr.request.fit_size import warn_crops
from kadr.request.pass_media import (
    PassMedia,
    check_inside_windows,
    pass_conditions,
    pass_control,
    pass_input_video,
    window_conditions,
)
from kadr.request.passes import (
    ResolvedPass,
    check_skip_blocks,
    known,
    known_size,
    resolve_passes,
    resolve_window_passes,
    warn_distilled_guidance,
    warn_step_cache,
    window_spans,
)
from kadr.request.request import Request, check_request
from kadr.request.resolved_conditions import resolve_conditions
from kadr.request.resolved_controls import resolve_controls
from kadr.request.resolved_media import resolve_input_video
from kadr.request.resolved_request import ResolvedRequest
from kadr.request.windows import prompts_of_windows
from kadr.shapes import snap_frames
from kadr.spec.model import ModelSpec


def resolve(request: Request, spec: ModelSpec, *, with_media: bool = True) -> ResolvedRequest:
    """Returns the request with nothing left open for this model. Deterministic, and reads no more than headers.

    Args:
        with_media: resolve conditions, controls and input video; decoding alone does not need them.

    Raises:
        RequestError: the request does not fit this model.
        MediaError: the header of an image or clip cannot be read.
        CheckpointError: the request has two passes, but there is no upscaler.
    """
    completed = complete_request(check_request(request), spec.recipe)
    warn_single_pass(request, completed, spec.recipe)
    upscaling = spec.upscaling(has_two_passes=bool(completed.multi_scale))
    passes = resolve_passes(completed, spec.schedules, upscaling=upscaling)
    lora_strengths = _check_passes(passes, completed, spec)
    window_passes = resolve_window_passes(completed, spec.schedules[0])
    return ResolvedRequest(
        request=completed,
        prompts=prompts_of_windows(completed.prompts, window_spans(completed), float(known(completed.fps))),
        negative_prompt=known(completed.negative_prompt),
        size=known_size(completed),
        frames=known(completed.frames),
        fps=float(known(completed.fps)),
        seed=completed.seed,
        passes=passes,
        windows=completed.windows,
        window_passes=window_passes,
        spans=window_spans(completed),
        **(_resolve_media(completed, passes, window_passes, spec) if with_media else {}),
        lora_strengths=lora_strengths,
        image_noise=float(known(completed.image_noise)),
        image_crf=known(completed.image_crf),
        decode_timestep=float(known(completed.decode_timestep)),
        decode_noise=float(known(completed.decode_noise)),
        guidance_batch=completed.guidance_batch,
        step_cache=completed.step_cache,
    )


def _check_passes(passes: Sequence[ResolvedPass], request: Request, spec: ModelSpec) -> tuple[tuple[float, ...], ...]:
    """Refuses passes that this model cannot run, warns of unwise ones, and returns the strengths of LoRAs in each."""
    strengths = []
    for pass_index, resolved_pass in enumerate(passes):
        check_skip_blocks(resolved_pass, spec.transformer_config_of(pass_index).num_layers)
        warn_step_cache(resolved_pass, request.step_cache)
        warn_distilled_guidance(resolved_pass, *spec.names_and_releases[pass_index], spec.schedules[pass_index])
        strengths.append(spec.loras.strengths(pass_index, request.lora_strengths))
    spec.loras.check_merge(len(passes), spec.transformer_checkpoints)
    return tuple(strengths)


def _resolve_media(
    request: Request, passes: Sequence[ResolvedPass], window_passes: Sequence[ResolvedPass], spec: ModelSpec
) -> dict[str, Any]:
    """Returns the fields of a `ResolvedRequest` that its images and clips decide."""
    size, frames, fps, spans = known_size(request), known(request.frames), known(request.fps), window_spans(request)
    conditions = resolve_conditions(request.conditions, frames)
    if spans:
        check_inside_windows(conditions, spans)
    controls = resolve_controls(request.controls, frames)
    downscale = spec.loras.reference_downscale(request.lora_strengths) if controls else 1
    path = request.input_video
    input_video = None if path is None else resolve_input_video(path, frames, snap_frames(frames))
    by_pass = tuple(pass_conditions(conditions, size, fps, resolved_pass) for resolved_pass in passes)
    by_window = tuple(window_conditions(by_pass[0], span) for span in spans) or by_pass
    media = tuple(
        PassMedia(
            in_pass,
            pass_input_video(input_video, size, fps, resolved_pass),
            tuple(pass_control(control, size, fps, resolved_pass, downscale) for control in controls),
        )
        for in_pass, resolved_pass in zip(by_window, window_passes or passes, strict=True)
    )
    uses = [condition.frames for condition in by_pass[0]]
    uses += [item.input_video for item in media if item.input_video is not None]
    warn_crops([*uses, *(control for item in media for control in item.controls)], size)
    return {
        "conditions": conditions,
        "controls": controls,
        "input_video": input_video,
        "conditions_by_pass": by_pass,
        "media": media,
        "reference_downscale": downscale,
    }
