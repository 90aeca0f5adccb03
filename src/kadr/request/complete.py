"""Completing a request: every field that it leaves out is filled from the recipe of its model."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

from kadr.errors import KadrWarning, RequestError
from kadr.media.clip import probe_video
from kadr.media.prepare import DEFAULT_IMAGE_CRF
from kadr.models.registry import Recipe
from kadr.request.fit_size import with_fitting_size
from kadr.request.request import DEFAULT_DENOISE_STRENGTH, Request
from kadr.request.windows import Windows, check_prompt_count, prompts_of_windows, timed_prompts
from kadr.sampling.samplers import EULER
from kadr.sampling.settings import Pass
from kadr.shapes import MAX_FRAMES

PASS_DEFAULTS = Pass(sampler=EULER, tone_map=0.0)  # where neither request nor recipe has a value


def complete_request(request: Request, recipe: Recipe) -> Request:
    """Returns the request with every field that has a default: what it leaves out is taken from the recipe.

    Length and frame rate are taken from an input video instead, where there is one, and the size "auto" from the first
    image or clip. Windows are dropped where a single
    one covers the whole video.

    Raises:
        RequestError: two passes are requested, and neither the request nor the recipe defines the second; or the size
            is "auto", and there is no image or clip.
        MediaError: the input video, or the image or clip that decides the size, cannot be read.
    """
    if request.input_video is not None:
        request = _with_input_video_defaults(request)
    request = with_fitting_size(request, recipe.size)
    if request.windows is not None:
        request = _with_window_defaults(request, recipe)
    default_multi_scale = recipe.multi_scale if request.second_pass is None else True
    multi_scale = default_multi_scale if request.multi_scale is None else request.multi_scale
    if request.second_pass is not None and not multi_scale:
        raise RequestError("settings of a second pass are given, but a single pass is requested. Drop one of the two.")
    first, second = _pass_settings(request, recipe, multi_scale)
    completed = request.with_defaults(
        {
            "size": recipe.size,
            "frames": recipe.frames,
            "fps": recipe.fps,
            "multi_scale": multi_scale,
            "downscale_factor": recipe.downscale_factor,
            "negative_prompt": recipe.negative_prompt,
            "image_noise": recipe.image_noise,
            "image_crf": DEFAULT_IMAGE_CRF,
            "decode_timestep": recipe.decode_timestep,
            "decode_noise": recipe.decode_noise,
        }
    ).with_passes(first, second)
    return _with_denoise_strength(completed)


def with_duration(request: Request, seconds: float, recipe: Recipe) -> Request:
    """Returns the request with the frames of a duration, at the frame rate of the request or of the recipe.

    Raises:
        RequestError: the duration is not above 0, or too long.
    """
    fps = complete_request(request, recipe).fps
    if not 0 < seconds < math.inf or fps is None:
        raise RequestError(f"seconds is {seconds}; it must be a number above 0.")
    if seconds * fps > MAX_FRAMES:
        raise RequestError(f"seconds is {seconds:g}; at {fps:g} per second a video has at most {MAX_FRAMES / fps:g}.")
    return replace(request, frames=max(1, round(seconds * fps)))


def _pass_settings(request: Request, recipe: Recipe, multi_scale: bool) -> tuple[Pass, Pass | None]:
    if not multi_scale:
        single_pass = request.first_pass().with_defaults(recipe.single_pass or recipe.first_pass)
        return single_pass.with_defaults(PASS_DEFAULTS), None
    if request.second_pass is None and recipe.second_pass is None:
        raise RequestError(
            "two passes are requested, but this model's recipe has only one. Define the second with --second-steps or "
            "--second-sigmas."
        )
    requested = (request.second_pass or Pass()).with_defaults(Pass(tone_map=request.tone_map))
    second = requested.with_defaults(recipe.second_pass or Pass()).with_defaults(PASS_DEFAULTS)
    if second.steps is None and second.sigmas is None:
        raise RequestError("the second pass has neither steps nor sigmas. Give --second-steps or --second-sigmas.")
    if (second.sigmas is None and not second.skip_initial) or (second.sigmas and second.sigmas[0] >= 1):
        raise RequestError(
            "the second pass begins at sigma 1: nothing of the first would remain. Give it sigmas that begin below 1, "
            "or skip initial steps."
        )
    return request.first_pass().with_defaults(recipe.first_pass).with_defaults(PASS_DEFAULTS), second


def _with_input_video_defaults(request: Request) -> Request:
    """Returns the request with the length and frame rate of its input video, where it leaves them out."""
    assert request.input_video is not None
    header = probe_video(request.input_video)
    if request.frames is None:
        header.refuse_cut_off(request.input_video)
    return request.with_defaults({"frames": header.frames, "fps": float(header.fps)})


def _with_window_defaults(request: Request, recipe: Recipe) -> Request:
    """Returns the request with its windows and their number resolved.

    Raises:
        RequestError: two passes are requested, or there are more prompts than windows.
    """
    assert request.windows is not None
    first_frames = (0,) if request.frames is None else (0, -request.frames)
    has_anchor_image = any(
        condition.frame in first_frames and not condition.is_clip and condition.box is None
        for condition in request.conditions
    )
    windows = request.windows.with_defaults(recipe.frames, has_anchor_image=has_anchor_image)
    prompts, timed = request.prompts, timed_prompts(request.prompts)
    frames = request.frames or _frames_of_prompts(request, windows, recipe)
    spans = windows.spans(frames)
    count = len(spans)
    if not timed:
        check_prompt_count(prompts, count)
    chosen = prompts_of_windows(prompts, spans, request.fps or recipe.fps)
    if count == 1:
        return replace(request, windows=None, frames=frames, prompt=chosen[0])
    if request.multi_scale or request.second_pass is not None:
        raise RequestError(
            f"{count} windows and two passes are requested, but windows are sampled in one pass. Give --single-pass "
            "and no settings of a second pass, or no windows."
        )
    return replace(request, windows=windows, frames=frames, multi_scale=False)


def _frames_of_prompts(request: Request, windows: Windows, recipe: Recipe) -> int:
    """Returns the frames of a long video whose length its prompts decide: a window each, or to the last one's end."""
    prompts, timed = request.prompts, timed_prompts(request.prompts)
    if timed and timed[-1].end is not None:
        return max(1, round(timed[-1].end * (request.fps or recipe.fps)))
    return windows.total_frames(len(prompts)) if len(prompts) > 1 else recipe.frames


def warn_single_pass(original: Request, request: Request, recipe: Recipe) -> None:
    """Warns where windows replace a recipe's two passes.

    Args:
        original: the request before it was completed.
        request: the completed request.
    """
    if request.windows is not None and recipe.multi_scale and original.multi_scale is None:
        message = (
            "this model's recipe has two passes, but windows are sampled in one pass, at the full size. Pass "
            "--single-pass to silence this warning."
        )
        warnings.warn(KadrWarning(message, topic="windows", fix="--single-pass"), stacklevel=2)


def _with_denoise_strength(request: Request) -> Request:
    """Returns the request with a denoise strength, if it has an input video and no other choice of the first sigma."""
    if request.input_video is None or request.denoise_strength is not None:
        return request
    if request.skip_initial or (request.sigmas and request.sigmas[0] < 1):
        return request
    return replace(request, denoise_strength=DEFAULT_DENOISE_STRENGTH)
