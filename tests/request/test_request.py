"""Requests: what is refused, how the rest is filled in, and their form as JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kadr import Condition, Control, Request, Size, StepCache
from kadr.errors import KadrError, RequestError
from kadr.models.registry import DISTILLED_SIGMAS, RELEASES_BY_NAME, Recipe
from kadr.request.resolve import resolve
from kadr.request.windows import Windows
from kadr.sampling.settings import Guidance, Pass

PROMPT = "a red circle"
PHOTO = Condition(media="photo.jpg")
FULL = Request(
    prompt='ein roter Kreis, 電影 "кадр"',
    size=Size(704, 480),
    frames=25,
    fps=23.976,
    seed=-(2**70),
    steps=12,
    skip_initial=1,
    skip_final=2,
    guidance=3,
    guidance_batch=True,
    negative_prompt="",
    stochastic=False,
    cache=StepCache("taylor", interval=2),
    conditions=(Condition(media="/a b/photo.jpg", strength=0.6),),
    controls=(Control(media="/a b/walk.mp4", kind="canny", frame_range=(3, None)),),
    image_noise=0.15,
    image_crf=0,
    decode_timestep=0.05,
    decode_noise=0.0,
    original_prompt='Kreis "кадр"',
)
IN_WINDOWS = Windows(frames=41, overlap=16, overlap_strength=0.75, adain=0.5, anchor_strength=0.25)
BY_LEVELS = Request(prompt=PROMPT, sigmas=DISTILLED_SIGMAS, stochastic=True, windows=IN_WINDOWS)
BY_LISTS = Guidance(
    cfg_scale=(1.0, 4.0),
    stg_scale=(0.0, 2.0),
    rescale=(1.0, 0.5),
    skip_blocks=((), (3, 5)),
    stg_mode="attention_skip",
    sigmas=(1.0, 0.9),
    cfg_star=True,
    apg=-0.5,
    apg_norm=2.5,
)
IN_TWO_PASSES = Request(
    lora_strengths=(0.5, (1.0, 0.0)),
    prompt=PROMPT,
    guidance=BY_LISTS,
    multi_scale=True,
    downscale_factor=0.5,
    tone_map=0.25,
    second_pass=Pass(
        sigmas=(0.9, 0.5),
        guidance=Guidance(cfg_scale=2.5, stg_scale=1.0, skip_blocks=(0, 7)),
        stochastic=True,
        tone_map=0.6,
    ),
    conditions=(
        Condition(media="left.png", box=(0, 0, 352, 480)),
        Condition(media="right.mp4", box=(352, 0, 352, 480), frame_range=(-9, None), strength=0.5),
        Condition(media="clip.mkv", frame=-1, frame_range=(None, -16)),
        Condition(media="frames.bin", frame=8, is_clip=True, frame_range=(3, 20)),
        Condition(media="odd.mp4", frame=40, is_clip=False),
    ),
)
FROM_VIDEO = Request(
    prompt=PROMPT,
    input_video="/a b/кадр.mp4",
    denoise_strength=0.6,
    second_pass=Pass(steps=4, skip_initial=2, skip_final=1),
)
BASE = Recipe()  # one pass of 40 steps
DISTILLED = RELEASES_BY_NAME["ltxv-2b-0.9.8-distilled"].recipe
NAN, INFINITY = float("nan"), float("inf")

REFUSED: list[tuple[str, Any, str]] = [  # a field, a value no video can have, what the message must say
    *(("prompt", value, "prompt") for value in ("", "   ", "\n\t", None, 5, b"circle")),
    *(("negative_prompt", value, repr(value)) for value in (5, b"blurry", ["blurry"])),
    *(("original_prompt", value, repr(value)) for value in (5, b"circle", "")),
    *(("size", value, repr(value)) for value in ((64,), (64, 64, 3), 64, "wide", ())),
    *(("size", value, "between 1 and 8192") for value in ((0, 64), (64, -1), (64, 8193))),
    *(("size", value, "whole number") for value in ((64.0, 64), (64, "64"), (NAN, 64), (None, 64))),
    *(("frames", value, "between 1 and 36001") for value in (0, -1, 10**9)),
    *(("frames", value, "whole number") for value in (25.0, "25", NAN, True)),
    *(("fps", value, "between 0.1 and 240") for value in (0, -24, 0.01, 241, 1e9)),
    *(("fps", value, "must be a number") for value in (NAN, INFINITY, -INFINITY, "24", True)),
    *(("seed", value, "whole number") for value in (1.0, "1", None, True, NAN)),
    *(("steps", value, "between 1 and 1000") for value in (0, -1, 1001)),
    *(("steps", value, "whole number") for value in (2.5, "4", NAN, True)),
    *(("levels", value, "levels") for value in (0.5, "abc", ("a",), (1.0, None))),
    *(("skip_initial", value, "skip_initial") for value in (-1, 0.5, "1", None)),
    *(("skip_final", value, "skip_final") for value in (-1, 0.5, "1", None)),
    *(("guidance", value, "between 1 and 100; 1 is off") for value in (0.99, 0, -3, 101)),
    *(("guidance", value, "must be a number") for value in (NAN, INFINITY, "3")),
    *(
        (name, value, "true or false")
        for name in ("guidance_batch", "stochastic", "multi_scale")
        for value in ("no", 1)
    ),
    *(("second", value, "must be a Pass") for value in ({"steps": 3}, 3, "abc")),
    *(("conditions", value, "Condition") for value in (["photo.jpg"], PHOTO, "photo.jpg", None, [None])),
    *(("tone_map", value, "between 0 and 1") for value in (-0.1, 1.5)),
    *(("video_strength", value, "no video to start from") for value in (0.5, 1)),
    *(("image_noise", value, "image_noise") for value in (-0.1, NAN, 11, "a")),
    *(("image_crf", value, "between 0 and 51") for value in (-1, 52)),
    ("image_crf", 28.5, "whole number"),
    *(("decode_timestep", value, "between 0 and 1") for value in (-0.1, 1.1)),
    *(("decode_noise", value, "between 0 and 1") for value in (-0.1, 1.1)),
    *(("decode_noise", value, "must be a number") for value in (NAN, "a")),
]


@pytest.mark.parametrize(("name", "value", "says"), REFUSED, ids=[f"{name}={value!r}" for name, value, _ in REFUSED])
def test_a_value_that_no_video_can_have_is_refused_with_its_limit(name: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**{"prompt": PROMPT, name: value})
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)
    if isinstance(value, (int, float)) and name != "prompt":
        assert f"{value:g}" in str(caught.value) or repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *(("strength", value, "between 0 and 1") for value in (-0.1, 1.1, 5)),
        *(("strength", value, "must be a number") for value in (NAN, INFINITY, "1", None, True)),
        ("strength", 0, "Give more than 0"),
        *(("frame", value, "must be a whole number") for value in (None, "0", 1.5)),
        *(("frame", value, "between -36001 and 36001") for value in (-40000, 40000)),
        *(("part", value, "(first, end)") for value in (3, (1,), (1, "2"), (0.5, 2))),
        ("part", (0, 9), "Only a clip has parts"),
        *(("clip", value, "true or false") for value in ("no", 1, 0)),
        *(("box", value, "(x, y, width, height)") for value in (3, (1, 2, 3), (1, 2, 3, "4"))),
        *(("box", value, "must not be below 0") for value in ((-1, 0, 32, 32), (0, 0, 0, 32))),
    ],
)
def test_a_condition_that_cannot_be_kept_is_refused_with_its_limit(name: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Condition(**{"media": "photo.jpg", name: value})
    assert says in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *(("kind", value, "one of canny, depth, pose, ready") for value in ("dog", None, 3)),
        *(("part", value, "(first, end)") for value in (3, (1,), (1, "2"), (0.5, 2))),
    ],
)
def test_a_control_that_cannot_be_followed_is_refused_with_what_can(name: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Control(**{"media": "walk.mp4", name: value})
    assert says in str(caught.value)
    assert name in str(caught.value)


def test_controls_are_a_list_of_controls_and_a_picture_has_no_parts() -> None:
    for given in ("walk.mp4", Control("walk.mp4"), ["walk.mp4"]):
        with pytest.raises(RequestError, match="must be a list of Control"):
            Request(prompt=PROMPT, controls=given)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="Only a clip has parts"):
        Control("photo.jpg", frame_range=(0, 9))


def test_levels_and_steps_are_the_one_or_the_other() -> None:
    for more in ({"steps": 3}, {"skip_initial": 1}, {"skip_final": 1}):
        with pytest.raises(RequestError, match="the one or the other"):
            Request(prompt=PROMPT, sigmas=(1.0, 0.5), **more)


def test_a_size_may_be_a_pair_and_lists_become_tuples() -> None:
    made = Request(prompt=PROMPT, size=(64, 32), sigmas=[1.0, 0.5], conditions=[PHOTO])
    assert made == Request(prompt=PROMPT, size=Size(64, 32), sigmas=(1.0, 0.5), conditions=(PHOTO,))
    assert hash(made) == hash(Request(prompt=PROMPT, size=Size(64, 32), sigmas=(1.0, 0.5), conditions=(PHOTO,)))
    assert Condition(media=Path("photo.jpg")) == PHOTO
    assert made.media_paths() == (Path("photo.jpg"),)


RESOLVED = resolve(Request(prompt=PROMPT), DISTILLED)


@pytest.mark.parametrize("request_", [FULL, BY_LEVELS, IN_TWO_PASSES, FROM_VIDEO, Request(prompt=PROMPT), RESOLVED])
def test_a_request_survives_json(request_: Request) -> None:
    text = json.dumps(request_.to_json(), allow_nan=False)
    made = Request.from_json(json.loads(text))
    assert made == request_
    assert hash(made) == hash(request_)


def test_every_field_of_requests_passes_guidance_and_conditions_is_in_one_that_goes_through_json() -> None:
    asked = (FULL, BY_LEVELS, IN_TWO_PASSES, FROM_VIDEO)
    passes = [request.second_pass or Pass() for request in asked]
    guidances = [BY_LISTS, IN_TWO_PASSES.second_pass.guidance] if IN_TWO_PASSES.second_pass else []
    shown = [condition for request in asked for condition in request.conditions]
    followed = [control for request in asked for control in request.controls]
    for made, plain in (
        (asked, Request(prompt="another")),
        (passes, Pass()),
        (guidances, Guidance()),
        (shown, Condition(media="another")),
        (followed, Control(media="another")),
        ([IN_WINDOWS], Windows()),
    ):
        for field in fields(plain):
            assert any(getattr(one, field.name) != getattr(plain, field.name) for one in made), field.name


def test_json_without_defaults_is_read() -> None:
    assert Request.from_json({"prompt": PROMPT}) == Request(prompt=PROMPT)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"prompt": PROMPT, "promt": "x"},
        {"prompt": PROMPT, "size": "wide"},
        {"prompt": PROMPT, "size": [64, 64]},
        {"prompt": PROMPT, "seed": 1.5},
        {"prompt": PROMPT, "levels": "abc"},
        {"prompt": PROMPT, "levels": 1},
        {"prompt": PROMPT, "conditions": None},
        {"prompt": PROMPT, "conditions": ["photo.jpg"]},
        {"prompt": PROMPT, "conditions": [{"media": "a", "framme": 0}]},
        {"prompt": PROMPT, "conditions": [{"strength": 1.0}]},
        {"prompt": PROMPT, "conditions": [{"media": "a", "strength": 7}]},
        {"prompt": PROMPT, "conditions": [{"media": "a", "clip": "no"}]},
        {"prompt": PROMPT, "conditions": [{"media": "a.mp4", "part": "0:9"}]},
        {"prompt": PROMPT, "guidance": {"scale": 0}},
        {"prompt": PROMPT, "guidance": {"scael": 3}},
        {"prompt": PROMPT, "guidance": "3"},
        {"prompt": PROMPT, "second": "abc"},
        {"prompt": PROMPT, "second": ["steps"]},
        {"prompt": PROMPT, "second": {"stesp": 3}},
        {"prompt": PROMPT, "second": {"steps": 3, "guidance": 3.0}},
        {"prompt": PROMPT, "second": {"levels": [0.5], "stochastic": "no"}},
        {"prompt": PROMPT, "multi_scale": "no"},
        {"prompt": PROMPT, "stochastic": 1},
        {"prompt": PROMPT, "guidance_batch": "false"},
        "abc",
        [PROMPT],
        None,
    ],
    ids=str,
)
def test_json_that_is_no_request_is_refused(data: Any) -> None:
    with pytest.raises(RequestError):
        Request.from_json(data)


# --- filling in ---------------------------------------------------------------------------------------------------


def test_what_is_left_out_comes_from_the_recipe_and_what_is_said_stays() -> None:
    made = resolve(Request(prompt=PROMPT), BASE)
    assert (made.size, made.frames, made.fps) == (BASE.size, BASE.frames, BASE.fps)
    assert made.first_pass() == replace(BASE.first_pass, stochastic=False, tone_map=0.0)
    said = replace(FULL, multi_scale=False, downscale_factor=0.5)
    kept = resolve(said, BASE)
    for field in fields(Request):
        if field.name not in ("guidance", "tone_map") and getattr(said, field.name) is not None:
            assert getattr(kept, field.name) == getattr(said, field.name), field.name
    assert kept.first_pass().guidance.cfg_scale == said.first_pass().guidance.cfg_scale


def test_nothing_is_taken_for_left_out() -> None:
    """0, "" and False are said."""
    said = {"negative_prompt": "", "stochastic": False, "image_noise": 0.0, "image_crf": 0, "multi_scale": False}
    said |= {"decode_noise": 0.0, "decode_timestep": 0.0, "tone_map": 0.0}
    made = resolve(Request(prompt=PROMPT, **said), DISTILLED)  # type: ignore[arg-type]
    assert {name: getattr(made, name) for name in said} == said


@pytest.mark.parametrize(
    ("asked", "recipe", "steps", "levels"),
    [
        ({}, BASE, 40, None),
        ({}, DISTILLED, None, DISTILLED_SIGMAS[:7]),
        ({"multi_scale": False}, DISTILLED, None, DISTILLED_SIGMAS),
        ({"steps": 5}, BASE, 5, None),
        ({"steps": 5}, DISTILLED, 5, None),
        ({"levels": (0.9, 0.5)}, BASE, None, (0.9, 0.5)),
        ({"levels": (0.9, 0.5)}, DISTILLED, None, (0.9, 0.5)),
        ({"skip_final": 1}, BASE, 40, None),
        ({"skip_final": 1, "multi_scale": False}, DISTILLED, 8, None),
        ({"skip_initial": 2, "steps": 6}, DISTILLED, 6, None),
    ],
)
def test_either_steps_or_levels_are_filled_in(
    asked: dict[str, Any], recipe: Recipe, steps: int | None, levels: tuple[float, ...] | None
) -> None:
    made = resolve(Request(prompt=PROMPT, **asked), recipe)
    assert (made.steps, made.sigmas) == (steps, levels)


@pytest.mark.parametrize("name", RELEASES_BY_NAME)
def test_resolving_twice_changes_nothing(name: str) -> None:
    recipe = RELEASES_BY_NAME[name].recipe
    for asked in (Request(prompt=PROMPT), Request(prompt=PROMPT, steps=5), Request(prompt=PROMPT, guidance=2.0)):
        once = resolve(asked, recipe)
        assert resolve(once, recipe) == once


def test_a_number_for_guidance_changes_its_scale_and_leaves_the_rest_to_the_recipe() -> None:
    dev = RELEASES_BY_NAME["ltxv-13b-0.9.8-dev"].recipe
    assert dev.second_pass is not None
    made = resolve(Request(prompt=PROMPT, guidance=5.0), dev)
    assert made.guidance == replace(dev.first_pass.guidance, cfg_scale=5.0)
    assert made.second_pass == replace(dev.second_pass, stochastic=False, tone_map=0.0)


def test_a_tone_map_is_for_what_is_decoded() -> None:
    made = resolve(Request(prompt=PROMPT, tone_map=0.9), DISTILLED)
    assert made.second_pass is not None
    assert made.second_pass.tone_map == 0.9
    own = resolve(Request(prompt=PROMPT, tone_map=0.9, second_pass=Pass(tone_map=0.1)), DISTILLED)
    assert own.second_pass is not None
    assert own.second_pass.tone_map == 0.1


@pytest.mark.parametrize(
    ("asked", "recipe", "says"),
    [
        ({"multi_scale": True}, BASE, "this model's recipe has one only"),
        ({"second": Pass(steps=4, skip_initial=2), "multi_scale": False}, DISTILLED, "a single pass is asked for"),
        ({"second": Pass(steps=4)}, DISTILLED, "begins at level 1"),
        ({"second": Pass(sigmas=(1.0, 0.5))}, DISTILLED, "begins at level 1"),
        ({"second": Pass(skip_initial=2)}, BASE, "neither steps nor levels"),
    ],
)
def test_two_passes_that_cannot_be_are_refused(asked: dict[str, Any], recipe: Recipe, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        resolve(Request(prompt=PROMPT, **asked), recipe)


def test_a_filled_request_is_checked_as_any_other() -> None:
    with pytest.raises(KadrError, match="guidance"):
        Request(prompt=PROMPT).with_defaults({"guidance": 0.0})
    with pytest.raises(RequestError, match="fps"):
        replace(FULL, fps=0)
