"""Requests mean what clients wrote, and what would fail later is refused with the field and the way out."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import CheckpointError, RequestError
from kadr.hidden_paths import PathHider
from kadr.server.errors import ApiError
from kadr.server.inputs.forms import parse_fields
from tests.page_commands import ROOT
from tests.server.opened_app import SMALL, OpenedApp, open_app

DEMO_FILE = ROOT / "src" / "kadr" / "assets" / "demo" / "demo.safetensors"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("seed", "7"), ("prompt", "7"), ("fps", "12.5")], {"seed": 7, "prompt": "7", "fps": 12.5}),
        (
            [("guidance[cfg_scale]", "3"), ("guidance[cfg_star]", "true")],
            {"guidance": {"cfg_scale": 3, "cfg_star": True}},
        ),
        ([("guidance", '{"cfg_scale": 3}')], {"guidance": {"cfg_scale": 3}}),
        ([("sigmas[]", "1.0"), ("sigmas[]", "0.5")], {"sigmas": [1.0, 0.5]}),
        ([("sigmas", "[1.0, 0.5]")], {"sigmas": [1.0, 0.5]}),
        ([("loras[]", "42"), ("lora", "3.5")], {"loras": ["42"], "lora": "3.5"}),
        (
            [("video[id]", "video_1"), ("input_reference[file_id]", "12")],
            {"video": {"id": "video_1"}, "input_reference": {"file_id": "12"}},
        ),
        ([("extra_params[prompt]", "true")], {"extra_params": {"prompt": "true"}}),
    ],
)
def test_fields_of_a_form_are_what_clients_mean(fields: list[tuple[str, str]], expected: dict[str, Any]) -> None:
    assert parse_fields(fields) == expected


def test_objects_of_a_list_are_put_together_in_either_order() -> None:
    by_object = [("c[][media]", "a"), ("c[][frame]", "0"), ("c[][media]", "b"), ("c[][frame]", "8")]
    by_field = [("c[][media]", "a"), ("c[][media]", "b"), ("c[][frame]", "0"), ("c[][frame]", "8")]
    expected = {"c": [{"media": "a", "frame": 0}, {"media": "b", "frame": 8}]}
    assert parse_fields(by_object) == parse_fields(by_field) == expected


@pytest.mark.parametrize(
    "fields",
    [
        [("c[][media]", "a"), ("c[][media]", "b"), ("c[][frame]", "8")],  # of a or of b?
        [("c[][box][]", "1"), ("c[][box][]", "2")],
        [("c", '[{"media": "a"}]'), ("c[][frame]", "8")],
        [("c[]", "1"), ("c[][frame]", "8")],
        [("seed", "1"), ("seed", "2")],
        [("guidance", "3"), ("guidance[cfg_scale]", "2")],
        [("[seed]", "1")],
        [("seed[", "1")],
        [("a[b][c][d][e][f]", "1")],
    ],
)
def test_fields_that_may_mean_two_things_are_refused(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(ApiError) as caught:
        parse_fields(fields)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"size": "101x100"}, "size", "even sides"),
        ({"fps": "24"}, "fps", "valid number"),
        ({"loras": [{"strength": 1}]}, "loras.0.name", "required"),
        ({"Colour": 1}, "Colour", "not a parameter"),
        ({"input_reference": {"Url": "x"}}, "input_reference.Url", "not a parameter"),
        ({"seconds": 1}, "seconds", "both seconds and frames"),
        ({"frames": 9}, "num_frames", "both num_frames and frames"),
        ({"width": 64}, "size", "width with height"),
        ({"seconds": "long", "num_frames": None}, "seconds", "above 0"),
    ],
)
def test_field_that_is_wrong_is_named(local_app: OpenedApp, settings: dict[str, Any], param: str, message: str) -> None:
    with local_app.unchanged():
        answer = local_app.send("POST", "/v1/videos", json_body={**SMALL, **settings})
    assert (answer.status, answer.error["param"]) == (400, param)
    assert message in answer.error["message"]


def test_edit_has_the_length_that_was_asked_for(local_app: OpenedApp) -> None:
    source = local_app.add_completed()
    body = {"prompt": "a blue circle", "video": source, "num_inference_steps": 24}

    def edit(**length: Any) -> Any:
        return local_app.send("POST", "/v1/videos/edits", json_body={**body, **length})

    lengths = [
        edit(**length).data["num_frames"] for length in ({}, {"num_frames": 5}, {"frames": 4}, {"seconds": "0.25"})
    ]
    assert lengths == [9, 5, 4, 6]
    assert edit(input_video=source).error["param"] == "input_video"
    assert edit(video=None).error["param"] == "video"


def test_extension_says_that_seconds_are_added(local_app: OpenedApp) -> None:
    source = local_app.add_completed()
    body = {"prompt": "a red circle", "video": {"id": source}}

    def extend(**length: Any) -> Any:
        return local_app.send("POST", "/v1/videos/extensions", json_body={**body, **length})

    assert extend(seconds=0.5).data["num_frames"] == 9 + 12
    assert extend().error["param"] == "seconds"
    for name in ("frames", "num_frames"):
        answer = extend(seconds=1, **{name: 33})
        assert (answer.status, answer.error["param"]) == (400, name)
        assert "seconds are the length to add" in answer.error["message"]


def test_addresses_are_https_behind_a_proxy_that_is(local_app: OpenedApp) -> None:
    video_id = local_app.add_completed()
    path = f"/v1/videos/{video_id}"
    plain = local_app.send("GET", path).data
    assert plain["url"].startswith(f"http://127.0.0.1:8000{path}/content?")
    headers = {"x-forwarded-proto": "https"}
    proxied = local_app.send("GET", path, headers=headers, host="localhost").data
    assert proxied["url"].startswith(f"https://localhost{path}/content?")
    assert proxied["thumbnail_url"].startswith("https://localhost/")
    for other in ("ftp", "https, http", "HTTPS"):
        headers = {"x-forwarded-proto": other}
        assert local_app.send("GET", path, headers=headers).data["url"].startswith("http://127.0.0.1:8000/")


def test_models_of_folders_have_their_names(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    folder = tmp_path / "models" / "checkpoints" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(DEMO_FILE, folder / "small.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"a": 1}        ')
    with open_app(tmp_path / "data", loop, models_dirs=(tmp_path / "models",)) as app:
        names = [model["id"] for model in app.send("GET", "/v1/models").data["data"]]
        assert names[0] == "demo"
        assert "mine/small.safetensors" in names
        for path in ("mine/small.safetensors", "mine%2Fsmall.safetensors", "mine/small"):
            assert app.send("GET", f"/v1/models/{path}").status == 200
        assert app.send("GET", "/v1/models/mine/other").code == "model_not_found"
        assert app.send("GET", "/v1/models/../data").status == 404
        answer = app.send("POST", "/v1/videos", json_body={**SMALL, "model": "mine/damaged"})
        assert (answer.status, answer.code) == (503, "model_unavailable")
        assert "damaged.safetensors" in app.lines[-1]


@pytest.mark.parametrize("model", ["no-such-model", "missing/model.safetensors"])
def test_server_does_not_start_with_a_model_that_is_not_there(
    model: str, tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    with pytest.raises((RequestError, CheckpointError), match=r"no model named|does not exist"):
        open_app(tmp_path / "data", loop, models={model: model}).__enter__()
    assert not (tmp_path / "data").exists()


def test_addresses_on_the_web_are_no_paths() -> None:
    hide = PathHider(["/srv/kadr data/queue"])
    message = (
        "/srv/kadr data/queue/jobs/a.mp4 of /models/x/y.safetensors: see https://huggingface.co/Lightricks/LTX-Video."
    )
    assert hide(message) == "a.mp4 of y.safetensors: see https://huggingface.co/Lightricks/LTX-Video."


@pytest.mark.parametrize("hides_prompts", [False, True])
def test_log_says_what_became_of_videos(hides_prompts: bool, tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    with open_app(tmp_path / "data", loop, hides_prompts=hides_prompts) as app:
        completed, cancelled = app.add_completed(), app.submit()
        app.send("POST", f"/v1/videos/{cancelled}/cancel")
        log = "\n".join(app.lines)
    assert f"{completed} is completed, after 0." in log
    assert log.endswith(f"{cancelled} failed: cancelled" + ": it was cancelled" * (not hides_prompts))
    assert (SMALL["prompt"] in log) == (not hides_prompts)
