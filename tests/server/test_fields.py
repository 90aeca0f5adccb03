"""Every field of a body with values of the wrong type, out of all bounds, twice, or unknown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kadr.request.inputs import Condition, Control
from kadr.request.windows import Windows
from kadr.sampling.settings import Guidance, Pass
from kadr.sampling.step_cache import StepCache
from kadr.server.schema import CreateVideo, EditVideo, ExtendVideo, LoraReference, MediaReference
from tests.server.answers import refused
from tests.server.media import clip, image
from tests.server.opened_app import ANNA, SMALL, OpenedApp

FIELDS = sorted(CreateVideo.model_fields)
VALUES: tuple[Any, ...] = (
    *(True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**300, 10**4000, 0.5, -0.0, 1e-320, 1e308, -1e308),
    *(
        "",
        " ",
        "x",
        "0",
        "NaN",
        "1e999",
        "\0",
        "\u202e",
        "é" * 100,
        "x" * 19_000,
        "64x64",
        "0x0",
        "-1x-1",
        "1" * 400 + "x1",
    ),
    *([], {}, [[]], [{}], [None], [1, "x", None, True, [], {}], [0.5] * 9000, {"": ""}, {"x": {"y": {"z": []}}}),
    *({"media": 1}, [{"media": None}], [{"media": "x", "frame": 1e308}], ["x"] * 64, ["x"] * 65, [1e308, -1e308]),
    *({"name": {}}, {"file_id": "x", "id": "y"}, {"image_url": ""}, {"file_id": None}, {"__class__": "x"}, "__init__"),
    *(3.0, "3", "true", "null", "[]", "{}", 12345678901234567890123456789, "9" * 5000, "0x10", "1_0", "１", "٣"),
)


def try_all(app: OpenedApp, fields: list[dict[str, Any]], path: str = "/v1/plan") -> None:
    """Sends bodies of which each either means something or is refused, and then says why."""
    with app.unchanged():
        for body in fields:
            answer = app.send("POST", path, token=ANNA, json_body=body)
            if answer.status != 200:
                refused(answer, (400, 404, 413, 415))


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_video_take_any_value(app: OpenedApp, name: str) -> None:
    try_all(app, [{**SMALL, name: value} for value in VALUES])


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_form_take_any_text(app: OpenedApp, name: str) -> None:
    texts = {value if isinstance(value, str) else json.dumps(value) for value in VALUES}
    headers = {"content-type": "multipart/form-data; boundary=b"}
    with app.unchanged():
        for suffix in ("", "[]", "[x]", "[media]", "[][media]"):
            for text in sorted(texts) if not suffix else ("x", "1", "{}"):
                fields = {"prompt": "x", "size": "64x64", "num_frames": "9", name + suffix: text}
                body = b"".join(
                    b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (key.encode(), value.encode())
                    for key, value in fields.items()
                )
                answer = app.send("POST", "/v1/plan", token=ANNA, body=body + b"--b--\r\n", headers=headers)
                if answer.status != 200:
                    refused(answer, (400, 404, 413, 415))


@pytest.mark.parametrize(
    "name, kind",
    [("guidance", Guidance), ("second_pass", Pass), ("windows", Windows), ("cache", StepCache)]
    + [("lora", LoraReference), ("input_reference", MediaReference)],
)
def test_fields_of_objects_take_any_value(app: OpenedApp, name: str, kind: Any) -> None:
    fields = getattr(kind, "model_fields", None) or kind.__dataclass_fields__
    try_all(app, [{**SMALL, name: {field: value}} for field in fields for value in VALUES])


@pytest.mark.parametrize("name, kind", [("conditions", Condition), ("controls", Control)])
def test_fields_of_conditions_take_any_value(app: OpenedApp, name: str, kind: Any) -> None:
    media = {"media": app.upload(clip(), ANNA)}
    fields = kind.__dataclass_fields__
    try_all(app, [{**SMALL, name: [{**media, field: value}]} for field in fields for value in VALUES])


@pytest.mark.parametrize("path, kind", [("/v1/videos/edits", EditVideo), ("/v1/videos/extensions", ExtendVideo)])
def test_fields_of_edits_take_any_value(app: OpenedApp, path: str, kind: Any) -> None:
    upload = app.upload(clip(), ANNA)
    base = {"prompt": "x", "video": {"file_id": upload}, "size": "1x1", "seconds": "1"}
    for name in ("video", "seconds", "fps", "frames", "num_frames", "width", "denoise_strength", "conditions"):
        bodies = [{**base, name: value} for value in VALUES]
        for body in bodies:  # refused at the end by a size that is too small, so that no job is made
            answer = app.send("POST", path, token=ANNA, json_body=body)
            assert answer.status in (200, 400, 404, 413, 415), answer


@pytest.mark.parametrize("path", ["move", "remix"])
def test_fields_of_other_bodies_take_any_value(app: OpenedApp, path: str) -> None:
    video_id = app.submit(ANNA)
    name = {"move": "before", "remix": "prompt"}[path]
    values = [value for value in VALUES if path == "move" or not isinstance(value, str)]
    with app.unchanged():
        for body in ({name: value} for value in values):
            refused(app.send("POST", f"/v1/videos/{video_id}/{path}", token=ANNA, json_body=body), (400, 404))
        refused(app.send("POST", f"/v1/videos/{video_id}/{path}", token=ANNA, json_body={"x": 1}), 400)


@pytest.mark.parametrize("query", ["after", "limit", "order", "status"])
def test_fields_of_queries_take_any_value(app: OpenedApp, query: str) -> None:
    for value in (
        "",
        "x",
        "-1",
        "0",
        "101",
        "9" * 400,
        "1.5",
        "%00",
        "%ff",
        "null",
        "desc&limit=x",
        "[]",
        "true",
        "%D9%A3",
    ):
        answer = app.send("GET", f"/v1/videos?{query}={value}", token=ANNA)
        if answer.status != 200:
            assert refused(answer, 400).error["param"]


@pytest.mark.parametrize(
    "twice",
    [
        {"num_frames": 9, "frames": 9},
        {"num_inference_steps": 1, "steps": 1},
        {"guidance_scale": 1, "guidance": 1},
        {"size": "64x64", "width": 64, "height": 64},
        {"width": 64},
        {"seconds": "1", "frames": 9},
        {"lora": "x", "loras": ["x"]},
        {"seed": 1, "extra_params": {"seed": 2}},
        {"extra_params": {"extra_params": {"seed": 2}}},
        {"extra_params": {"prompt": "y"}},
        {"sigmas": [1.0, 0.5], "steps": 2},
        {"input_reference": {"file_id": "x", "image_url": "data:,"}},
    ],
)
def test_fields_that_contradict_each_other_are_refused(app: OpenedApp, twice: dict[str, Any]) -> None:
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body={"prompt": "x", **twice}), 400)


@pytest.mark.parametrize(
    "name",
    ["user", "n", "response_format", "callback_url", "webhook", "output", "path", "original_prompt", "lora_strengths"]
    + [
        "is_clip",
        "schema",
        "owner",
        "id",
        "status",
        "__proto__",
        "",
        "\x1b[2J",
        "\u202e",
        "x" * 10_000,
        "é",
        "a.b",
        "body",
    ],
)
def test_unknown_fields_are_refused(app: OpenedApp, name: str) -> None:
    with app.unchanged():
        for fields in ({name: "/etc/passwd"}, {"extra_params": {name: 1}}):
            answer = app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, **fields})
            refused(answer, 400, "unknown_parameter")


@pytest.mark.parametrize("media", [{"is_clip": True}, {"path": "/etc/passwd"}, {"media": ["x"]}])
def test_condition_says_nothing_else_of_its_medium(app: OpenedApp, media: dict[str, Any]) -> None:
    condition = {"media": app.upload(image(), ANNA), **media}
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, "conditions": [condition]}), 400)


def test_text_is_limited(app: OpenedApp) -> None:
    with app.unchanged():
        for name in ("prompt", "negative_prompt"):
            refused(app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, name: "x" * 20_001}), 400)
        too_many = {"loras": ["x"] * 65}, {"conditions": [{"media": "x"}] * 65}, {"sigmas": [1.0] * 10_001}
        for fields in too_many:
            refused(app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, **fields}), 400, "invalid_value")
        key = {"idempotency-key": "x" * 256}
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body=SMALL, headers=key), 400, "invalid_value")


def test_queue_of_a_client_is_bounded(app: OpenedApp) -> None:
    limits, video = app.state.queue.store.limits, app.upload(clip(), ANNA)
    object.__setattr__(limits, "max_queued", app.state.queue.store.counts()["queued"] + 1)
    try:
        app.submit(ANNA)
        with app.unchanged():
            answer = refused(app.send("POST", "/v1/videos", token=ANNA, json_body=SMALL), 429, "queue_full")
            assert int(answer.header("retry-after") or "") >= 1
            edit = {"prompt": "x", "video": video}
            refused(app.send("POST", "/v1/videos/edits", token=ANNA, json_body=edit), 429, "queue_full")
            fields = {**SMALL, "input_reference": {"file_id": video}}
            refused(app.send("POST", "/v1/videos/sync", token=ANNA, json_body=fields), 429, "queue_full")
    finally:
        object.__setattr__(limits, "max_queued", 1000)
