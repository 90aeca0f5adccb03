"""From what a request says, and what the recipe says, to a request that leaves nothing open."""

from __future__ import annotations

from dataclasses import replace

from kadr.errors import RequestError
from kadr.media.clip import read_length
from kadr.media.image import DEFAULT_CRF
from kadr.models.registry import Recipe, Released
from kadr.pipeline.request import DEFAULT_VIDEO_STRENGTH, Request
from kadr.sampling.settings import Pass

PLAIN = Pass(stochastic=False, tone_map=0.0)  # what holds where neither request nor recipe says anything


def resolve(request: Request, recipe: Recipe) -> Request:
    """The request with everything it left out taken from a recipe.

    A video to start from gives its own length and rate.

    Raises:
        RequestError: two passes are asked for, and neither says how to run the second.
        MediaError: the video to start from cannot be read.
    """
    if request.video is not None:
        request = _as_video(request)
    wanted = recipe.multi_scale if request.second is None else True
    multi_scale = wanted if request.multi_scale is None else request.multi_scale
    if request.second is not None and not multi_scale:
        raise RequestError("settings of a second pass are given, and a single pass is asked for.")
    first, second = _passes(request, recipe, multi_scale)
    filled = request.filled(
        {
            "size": recipe.size,
            "frames": recipe.frames,
            "fps": recipe.fps,
            "multi_scale": multi_scale,
            "downscale": recipe.downscale,
            "negative_prompt": recipe.negative_prompt,
            "image_noise": recipe.image_noise,
            "image_crf": DEFAULT_CRF,
            "decode_timestep": recipe.decode_timestep,
            "decode_noise": recipe.decode_noise,
        }
    ).with_passes(first, second)
    return _with_strength(filled)


def with_second(recipe: Recipe, second: Released | None) -> Recipe:
    """The recipe where another model makes the second pass, in the way of its own recipe if it has one."""
    if second is None or second.recipe.second is None:
        return recipe
    return replace(recipe, second=second.recipe.second, multi_scale=True)


def _passes(request: Request, recipe: Recipe, multi_scale: bool) -> tuple[Pass, Pass | None]:
    if not multi_scale:
        return request.only_pass().over(recipe.alone or recipe.first).over(PLAIN), None
    if request.second is None and recipe.second is None:
        raise RequestError(
            "two passes are asked for, and this model's recipe has one only. Say how to run the second: --second-steps "
            "or --second-levels."
        )
    asked = (request.second or Pass()).over(Pass(tone_map=request.tone_map))
    second = asked.over(recipe.second or Pass()).over(PLAIN)
    if second.steps is None and second.levels is None:
        raise RequestError("the second pass has neither steps nor levels. Give --second-steps or --second-levels.")
    if (second.levels is None and not second.skip_initial) or (second.levels and second.levels[0] >= 1):
        raise RequestError(
            "the second pass begins at level 1: nothing of the first would stay. Give it levels that begin below 1, or "
            "skip some at the front."
        )
    return request.only_pass().over(recipe.first).over(PLAIN), second


def _as_video(request: Request) -> Request:
    """The request at the length and rate of the video it starts from, where it does not say."""
    assert request.video is not None
    frames, fps = read_length(request.video)
    return request.filled({"frames": frames, "fps": float(fps)})


def _with_strength(request: Request) -> Request:
    """The request with a strength, if it starts from a video and says in no other way at which level."""
    if request.video is None or request.video_strength is not None:
        return request
    if request.skip_initial or (request.levels and request.levels[0] < 1):
        return request
    return replace(request, video_strength=DEFAULT_VIDEO_STRENGTH)
