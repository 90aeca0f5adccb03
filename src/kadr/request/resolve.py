"""From what a request says, and what the recipe says, to a request that leaves nothing open."""

from __future__ import annotations

import warnings
from dataclasses import replace

from kadr.errors import KadrWarning, RequestError
from kadr.media.clip import probe_video
from kadr.media.image import DEFAULT_IMAGE_CRF
from kadr.models.registry import Recipe, Release
from kadr.request.request import DEFAULT_DENOISE_STRENGTH, Request
from kadr.request.windows import check_prompt_count
from kadr.sampling.settings import Pass

PASS_DEFAULTS = Pass(stochastic=False, tone_map=0.0)  # what holds where neither request nor recipe says anything


def resolve(request: Request, recipe: Recipe) -> Request:
    """The request with everything it left out taken from a recipe.

    A video to start from gives its own length and rate. Windows are left out where one of them is the whole video.

    Raises:
        RequestError: two passes are asked for, and neither says how to run the second.
        MediaError: the video to start from cannot be read.
    """
    if request.input_video is not None:
        request = _with_input_video_defaults(request)
    if request.windows is not None:
        request = _with_window_defaults(request, recipe)
    wanted = recipe.multi_scale if request.second_pass is None else True
    multi_scale = wanted if request.multi_scale is None else request.multi_scale
    if request.second_pass is not None and not multi_scale:
        raise RequestError("settings of a second pass are given, and a single pass is asked for.")
    first, second = _pass_settings(request, recipe, multi_scale)
    filled = request.with_defaults(
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
    return _with_denoise_strength(filled)


def with_second_model(recipe: Recipe, second_model: Release | None) -> Recipe:
    """The recipe where another model makes the second pass, in the way of its own recipe if it has one."""
    if second_model is None or second_model.recipe.second_pass is None:
        return recipe
    return replace(recipe, second_pass=second_model.recipe.second_pass, multi_scale=True)


def _pass_settings(request: Request, recipe: Recipe, multi_scale: bool) -> tuple[Pass, Pass | None]:
    if not multi_scale:
        return request.first_pass().with_defaults(recipe.single_pass or recipe.first_pass).with_defaults(
            PASS_DEFAULTS
        ), None
    if request.second_pass is None and recipe.second_pass is None:
        raise RequestError(
            "two passes are asked for, and this model's recipe has one only. Say how to run the second: --second-steps "
            "or --second-sigmas."
        )
    asked = (request.second_pass or Pass()).with_defaults(Pass(tone_map=request.tone_map))
    second = asked.with_defaults(recipe.second_pass or Pass()).with_defaults(PASS_DEFAULTS)
    if second.steps is None and second.sigmas is None:
        raise RequestError("the second pass has neither steps nor levels. Give --second-steps or --second-sigmas.")
    if (second.sigmas is None and not second.skip_initial) or (second.sigmas and second.sigmas[0] >= 1):
        raise RequestError(
            "the second pass begins at level 1: nothing of the first would stay. Give it levels that begin below 1, or "
            "skip some at the front."
        )
    return request.first_pass().with_defaults(recipe.first_pass).with_defaults(PASS_DEFAULTS), second


def _with_input_video_defaults(request: Request) -> Request:
    """The request at the length and rate of the video it starts from, where it does not say."""
    assert request.input_video is not None
    frames, fps = probe_video(request.input_video)
    return request.with_defaults({"frames": frames, "fps": float(fps)})


def _with_window_defaults(request: Request, recipe: Recipe) -> Request:
    """The request with nothing left open about its windows and their number.

    Raises:
        RequestError: two passes are asked for, or there are more prompts than windows.
    """
    assert request.windows is not None
    first = (0,) if request.frames is None else (0, -request.frames)
    picture = any(each.frame in first and not each.is_clip and each.box is None for each in request.conditions)
    windows, prompts = request.windows.with_defaults(recipe.frames, has_anchor_image=picture), request.prompts
    frames = request.frames or (windows.total_frames(len(prompts)) if len(prompts) > 1 else recipe.frames)
    count = len(windows.spans(frames))
    check_prompt_count(prompts, count)
    if count == 1:
        return replace(request, windows=None, frames=frames)
    if request.multi_scale or request.second_pass is not None:
        raise RequestError(
            f"{count} windows are asked for, and two passes: windows are made in one. Give --single-pass and no "
            "settings of a second pass, or no windows."
        )
    return replace(request, windows=windows, frames=frames, multi_scale=False)


def warn_single_pass(original: Request, request: Request, recipe: Recipe) -> None:
    """Say where windows take the place of a recipe's two passes.

    Args:
        original: the request before it was resolved.
    """
    if request.windows is not None and recipe.multi_scale and original.multi_scale is None:
        warnings.warn(
            "this model's recipe has two passes, and windows are made in one: the video is made at its full size at "
            "once. --single-pass says so without this warning.",
            KadrWarning,
            stacklevel=2,
        )


def _with_denoise_strength(request: Request) -> Request:
    """The request with a strength, if it starts from a video and says in no other way at which level."""
    if request.input_video is None or request.denoise_strength is not None:
        return request
    if request.skip_initial or (request.sigmas and request.sigmas[0] < 1):
        return request
    return replace(request, denoise_strength=DEFAULT_DENOISE_STRENGTH)
