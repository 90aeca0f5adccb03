"""Requests: refused values, defaults from recipes, and the round trip through JSON."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from kadr import Condition, Control, Request, Size, StepCache
from kadr.errors import KadrError, RequestError
from kadr.models.registry import DISTILLED_SIGMAS, RELEASES_BY_NAME, Recipe
from kadr.request.complete import complete_request
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
    sampler="euler",
    cache=StepCache("taylor", interval=2),
    conditions=(Condition(media="/a b/photo.jpg", strength=0.6),),
    controls=(Control(media="/a b/walk.mp4", kind="canny", frame_range=(3, None)),),
    image_noise=0.15,
    image_crf=0,
    decode_timestep=0.05,
    decode_noise=0.0,
    original_prompt='Kreis "кадр"',
)
WINDOWS = Windows(frames=41, overlap=16, overlap_strength=0.75, adain=0.5, anchor_strength=0.25)
WITH_SIGMAS = Request(prompt=PROMPT, sigmas=DISTILLED_SIGMAS, sampler="euler_stochastic", windows=WINDOWS)
LIST_GUIDANCE = Guidance(
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
TWO_PASSES = Request(
    lora_strengths=(0.5, (1.0, 0.0)),
    prompt=PROMPT,
    guidance=LIST_GUIDANCE,
    multi_scale=True,
    downscale_factor=0.5,
    tone_map=0.25,
    second_pass=Pass(
        sigmas=(0.9, 0.5),
        guidance=Guidance(cfg_scale=2.5, stg_scale=1.0, skip_blocks=(0, 7)),
        sampler="euler_stochastic",
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

REFUSED: list[tuple[str, Any, str]] = [  # field, bad value, text of the message
    *(("prompt", value, "prompt") for value in (None, 5, b"circle")),
    *(("negative_prompt", value, repr(value)) for value in (5, b"blurry", ["blurry"])),
    *(("original_prompt", value, repr(value)) for value in (5, b"circle")),
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
    *(("sigmas", value, "sigmas") for value in (0.5, "abc", ("a",), (1.0, None))),
    *(("skip_initial", value, "skip_initial") for value in (-1, 0.5, "1", None)),
    *(("skip_final", value, "skip_final") for value in (-1, 0.5, "1", None)),
    *(("guidance", value, "between 1 and 100; 1 is off") for value in (0.99, 0, -3, 101)),
    *(("guidance", value, "must be a number") for value in (NAN, INFINITY, "3")),
    *((name, value, "true or false") for name in ("guidance_batch", "multi_scale") for value in ("no", 1)),
    *(
        ("sampler", value, "must be one of euler, euler_stochastic")
        for value in ("heun", "", "Euler", 1, True, ["euler"])
    ),
    *(("second_pass", value, "must be a Pass") for value in ({"steps": 3}, 3, "abc")),
    *(("conditions", value, "Condition") for value in (["photo.jpg"], PHOTO, "photo.jpg", None, [None])),
    *(("tone_map", value, "between 0 and 1") for value in (-0.1, 1.5)),
    *(("denoise_strength", value, "no input video") for value in (0.5, 1)),
    *(("image_noise", value, "image_noise") for value in (-0.1, NAN, 11, "a")),
    *(("image_crf", value, "between 0 and 51") for value in (-1, 52)),
    ("image_crf", 28.5, "whole number"),
    *(("decode_timestep", value, "between 0 and 1") for value in (-0.1, 1.1)),
    *(("decode_noise", value, "between 0 and 1") for value in (-0.1, 1.1)),
    *(("decode_noise", value, "must be a number") for value in (NAN, "a")),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), REFUSED, ids=[f"{name}={value!r}" for name, value, _ in REFUSED]
)
def test_bad_value_is_refused_with_its_limit(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**{"prompt": PROMPT, name: value})
    assert expected in str(caught.value)
    assert isinstance(caught.value, ValueError)
    if isinstance(value, (int, float)) and name != "prompt":
        assert f"{value:g}" in str(caught.value) or repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("strength", value, "between 0 and 1") for value in (-0.1, 1.1, 5)),
        *(("strength", value, "must be a number") for value in (NAN, INFINITY, "1", None, True)),
        ("strength", 0, "Give more than 0"),
        *(("frame", value, "must be a whole number") for value in (None, "0", 1.5)),
        *(("frame", value, "between -36001 and 36001") for value in (-40000, 40000)),
        *(("frame_range", value, "(first, end)") for value in (3, (1,), (1, "2"), (0.5, 2))),
        ("frame_range", (0, 9), "Only a clip has a frame range"),
        *(("is_clip", value, "true or false") for value in ("no", 1, 0)),
        *(("box", value, "(x, y, width, height)") for value in (3, (1, 2, 3), (1, 2, 3, "4"))),
        *(("box", value, "must not be below 0") for value in ((-1, 0, 32, 32), (0, 0, 0, 32))),
    ],
)
def test_bad_condition_is_refused_with_its_limit(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        Condition(**{"media": "photo.jpg", name: value})
    assert expected in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("kind", value, "one of canny, depth, pose, ready") for value in ("dog", None, 3)),
        *(("frame_range", value, "(first, end)") for value in (3, (1,), (1, "2"), (0.5, 2))),
    ],
)
def test_bad_control_is_refused_with_its_limit(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        Control(**{"media": "walk.mp4", name: value})
    assert expected in str(caught.value)
    assert name in str(caught.value)


def test_controls_must_be_a_list_and_an_image_has_no_frame_range() -> None:
    for controls in ("walk.mp4", Control("walk.mp4"), ["walk.mp4"]):
        with pytest.raises(RequestError, match="must be a list of Control"):
            Request(prompt=PROMPT, controls=controls)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="Only a clip has a frame range"):
        Control("photo.jpg", frame_range=(0, 9))


def test_sigmas_and_steps_exclude_each_other() -> None:
    for fields_of_steps in ({"steps": 3}, {"skip_initial": 1}, {"skip_final": 1}):
        with pytest.raises(RequestError, match="one or the other"):
            Request(prompt=PROMPT, sigmas=(1.0, 0.5), **fields_of_steps)


def test_size_may_be_a_pair_and_lists_become_tuples() -> None:
    request = Request(prompt=PROMPT, size=(64, 32), sigmas=[1.0, 0.5], conditions=[PHOTO])
    assert request == Request(prompt=PROMPT, size=Size(64, 32), sigmas=(1.0, 0.5), conditions=(PHOTO,))
    assert hash(request) == hash(Request(prompt=PROMPT, size=Size(64, 32), sigmas=(1.0, 0.5), conditions=(PHOTO,)))
    assert Condition(media=Path("photo.jpg")) == PHOTO
    assert request.media_paths() == (Path("photo.jpg"),)


RESOLVED = complete_request(Request(prompt=PROMPT), DISTILLED)


@pytest.mark.parametrize("request_", [FULL, WITH_SIGMAS, TWO_PASSES, FROM_VIDEO, Request(prompt=PROMPT), RESOLVED])
def test_request_survives_json(request_: Request) -> None:
    text = json.dumps(request_.to_json(), allow_nan=False)
    reread = Request.from_json(json.loads(text))
    assert reread == request_
    assert hash(reread) == hash(request_)


def test_requests_of_the_json_test_set_every_field() -> None:
    requests = (FULL, WITH_SIGMAS, TWO_PASSES, FROM_VIDEO)
    passes = [request.second_pass or Pass() for request in requests]
    guidances = [LIST_GUIDANCE, TWO_PASSES.second_pass.guidance] if TWO_PASSES.second_pass else []
    conditions = [condition for request in requests for condition in request.conditions]
    controls = [control for request in requests for control in request.controls]
    for instances, default in (
        (requests, Request(prompt="another")),
        (passes, Pass()),
        (guidances, Guidance()),
        (conditions, Condition(media="another")),
        (controls, Control(media="another")),
        ([WINDOWS], Windows()),
    ):
        for field in fields(default):
            default_value = getattr(default, field.name)
            assert any(getattr(instance, field.name) != default_value for instance in instances), field.name


def test_json_may_leave_out_fields_with_defaults() -> None:
    assert Request.from_json({"prompt": PROMPT}) == Request(prompt=PROMPT)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"prompt": PROMPT, "promt": "x"},
        {"prompt": PROMPT, "size": "wide"},
        {"prompt": PROMPT, "size": [64, 64]},
        {"prompt": PROMPT, "seed": 1.5},
        {"prompt": PROMPT, "sigmas": "abc"},
        {"prompt": PROMPT, "sigmas": 1},
        {"prompt": PROMPT, "conditions": None},
        {"prompt": PROMPT, "conditions": ["photo.jpg"]},
        {"prompt": PROMPT, "conditions": [{"media": "a", "framme": 0}]},
        {"prompt": PROMPT, "conditions": [{"strength": 1.0}]},
        {"prompt": PROMPT, "conditions": [{"media": "a", "strength": 7}]},
        {"prompt": PROMPT, "conditions": [{"media": "a", "is_clip": "no"}]},
        {"prompt": PROMPT, "conditions": [{"media": "a.mp4", "frame_range": "0:9"}]},
        {"prompt": PROMPT, "guidance": {"cfg_scale": 0}},
        {"prompt": PROMPT, "guidance": {"cfg_scael": 3}},
        {"prompt": PROMPT, "guidance": "3"},
        {"prompt": PROMPT, "second_pass": "abc"},
        {"prompt": PROMPT, "second_pass": ["steps"]},
        {"prompt": PROMPT, "second_pass": {"stesp": 3}},
        {"prompt": PROMPT, "second_pass": {"steps": 3, "guidance": 3.0}},
        {"prompt": PROMPT, "second_pass": {"sigmas": [0.5], "stochastic": "no"}},
        {"prompt": PROMPT, "multi_scale": "no"},
        {"prompt": PROMPT, "stochastic": 1},
        {"prompt": PROMPT, "sampler": "heun"},
        {"prompt": PROMPT, "second_pass": {"sigmas": [0.5], "sampler": "heun"}},
        {"prompt": PROMPT, "guidance_batch": "false"},
        "abc",
        [PROMPT],
        None,
    ],
    ids=str,
)
def test_json_that_is_not_a_request_is_refused(data: Any) -> None:
    with pytest.raises(RequestError):
        Request.from_json(data)


@pytest.mark.parametrize(
    "value", ["x", "", [], [[]], [1], {}, {"a": 1}, 1.5, -1, 10**400, True, None], ids=lambda v: repr(v)[:9]
)
def test_wrong_data_in_any_field_raises_nothing_but_request_error(value: Any) -> None:
    complete = {**FULL.to_json(), "conditions": [asdict(PHOTO)], "controls": [asdict(Control("a.mp4"))]}
    nested = ("guidance", "second_pass", "windows", "cache")
    changes = [{**complete, name: value} for name in complete]
    changes += [{**complete, name: {field: value}} for name in nested for field in _fields_of(name)]
    changes += [{**complete, "conditions": [{"media": "a.mp4", field.name: value}]} for field in fields(Condition)]
    changes += [{**complete, "controls": [{"media": "a.mp4", field.name: value}]} for field in fields(Control)]
    for data in changes:
        with suppress(RequestError):
            Request.from_json(data)


def _fields_of(name: str) -> list[str]:
    kinds = {"guidance": Guidance, "second_pass": Pass, "windows": Windows, "cache": StepCache}
    return [field.name for field in fields(kinds[name])]


def test_bug_of_our_own_is_no_request_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(Request, "_check_windows", fail)
    with pytest.raises(TypeError, match="a bug"):
        Request.from_json({"prompt": PROMPT})


@pytest.mark.parametrize("stored, sampler", [(True, "euler_stochastic"), (False, "euler"), (None, None)])
def test_stored_stochastic_becomes_a_sampler_in_both_passes(stored: bool | None, sampler: str | None) -> None:
    data = {"prompt": PROMPT, "stochastic": stored, "second_pass": {"sigmas": [0.5], "stochastic": stored}}
    expected = Request(prompt=PROMPT, sampler=sampler, second_pass=Pass(sigmas=(0.5,), sampler=sampler))
    assert Request.from_json(data) == expected


# --- resolving ----------------------------------------------------------------------------------------------------


def test_recipe_fills_only_what_a_request_leaves_out() -> None:
    resolved = complete_request(Request(prompt=PROMPT), BASE)
    assert (resolved.size, resolved.frames, resolved.fps) == (BASE.size, BASE.frames, BASE.fps)
    assert resolved.first_pass() == replace(BASE.first_pass, sampler="euler", tone_map=0.0)
    request = replace(FULL, multi_scale=False, downscale_factor=0.5)
    resolved = complete_request(request, BASE)
    for field in fields(Request):
        if field.name not in ("guidance", "tone_map") and getattr(request, field.name) is not None:
            assert getattr(resolved, field.name) == getattr(request, field.name), field.name
    assert resolved.first_pass().guidance.cfg_scale == request.first_pass().guidance.cfg_scale


def test_falsy_values_are_not_replaced_by_defaults() -> None:
    """0, "" and False count as values."""
    values = {"negative_prompt": "", "sampler": "euler", "image_noise": 0.0, "image_crf": 0, "multi_scale": False}
    values |= {"decode_noise": 0.0, "decode_timestep": 0.0, "tone_map": 0.0}
    resolved = complete_request(Request(prompt=PROMPT, **values), DISTILLED)  # type: ignore[arg-type]
    assert {name: getattr(resolved, name) for name in values} == values


@pytest.mark.parametrize(
    ("fields_of_request", "recipe", "steps", "sigmas"),
    [
        ({}, BASE, 40, None),
        ({}, DISTILLED, None, DISTILLED_SIGMAS[:7]),
        ({"multi_scale": False}, DISTILLED, None, DISTILLED_SIGMAS),
        ({"steps": 5}, BASE, 5, None),
        ({"steps": 5}, DISTILLED, 5, None),
        ({"sigmas": (0.9, 0.5)}, BASE, None, (0.9, 0.5)),
        ({"sigmas": (0.9, 0.5)}, DISTILLED, None, (0.9, 0.5)),
        ({"skip_final": 1}, BASE, 40, None),
        ({"skip_final": 1, "multi_scale": False}, DISTILLED, 8, None),
        ({"skip_initial": 2, "steps": 6}, DISTILLED, 6, None),
    ],
)
def test_resolved_request_has_either_steps_or_sigmas(
    fields_of_request: dict[str, Any], recipe: Recipe, steps: int | None, sigmas: tuple[float, ...] | None
) -> None:
    resolved = complete_request(Request(prompt=PROMPT, **fields_of_request), recipe)
    assert (resolved.steps, resolved.sigmas) == (steps, sigmas)


@pytest.mark.parametrize("name", RELEASES_BY_NAME)
def test_resolving_twice_changes_nothing(name: str) -> None:
    recipe = RELEASES_BY_NAME[name].recipe
    for request in (Request(prompt=PROMPT), Request(prompt=PROMPT, steps=5), Request(prompt=PROMPT, guidance=2.0)):
        once = complete_request(request, recipe)
        assert complete_request(once, recipe) == once


def test_number_for_guidance_replaces_only_its_cfg_scale() -> None:
    dev = RELEASES_BY_NAME["ltxv-13b-0.9.8-dev"].recipe
    assert dev.second_pass is not None
    resolved = complete_request(Request(prompt=PROMPT, guidance=5.0), dev)
    assert resolved.guidance == replace(dev.first_pass.guidance, cfg_scale=5.0)
    assert resolved.second_pass == replace(dev.second_pass, sampler="euler", tone_map=0.0)


def test_tone_map_belongs_to_the_decoded_pass() -> None:
    resolved = complete_request(Request(prompt=PROMPT, tone_map=0.9), DISTILLED)
    assert resolved.second_pass is not None
    assert resolved.second_pass.tone_map == 0.9
    resolved = complete_request(Request(prompt=PROMPT, tone_map=0.9, second_pass=Pass(tone_map=0.1)), DISTILLED)
    assert resolved.second_pass is not None
    assert resolved.second_pass.tone_map == 0.1


@pytest.mark.parametrize(
    ("fields_of_request", "recipe", "expected"),
    [
        ({"multi_scale": True}, BASE, "this model's recipe has only one"),
        ({"second_pass": Pass(steps=4, skip_initial=2), "multi_scale": False}, DISTILLED, "a single pass is requested"),
        ({"second_pass": Pass(steps=4)}, DISTILLED, "begins at sigma 1"),
        ({"second_pass": Pass(sigmas=(1.0, 0.5))}, DISTILLED, "begins at sigma 1"),
        ({"second_pass": Pass(skip_initial=2)}, BASE, "neither steps nor sigmas"),
    ],
)
def test_two_passes_that_cannot_work_are_refused(
    fields_of_request: dict[str, Any], recipe: Recipe, expected: str
) -> None:
    with pytest.raises(RequestError, match=expected):
        complete_request(Request(prompt=PROMPT, **fields_of_request), recipe)


def test_request_with_defaults_is_checked_again() -> None:
    with pytest.raises(KadrError, match="guidance"):
        Request(prompt=PROMPT).with_defaults({"guidance": 0.0})
    with pytest.raises(RequestError, match="fps"):
        replace(FULL, fps=0)


def test_prompt_may_be_the_first_argument() -> None:
    assert Request(PROMPT, seed=3) == Request(prompt=PROMPT, seed=3)
