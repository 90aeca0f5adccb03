"""An mp4 that kadr made tells its settings when it is uploaded, and names what this server does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kadr
from kadr.server.auth import LOCAL_CLIENT
from kadr.server.inputs.uploads import StoredUpload
from kadr.server.routes.video_settings import read_settings
from tests.server.app_client import HOST
from tests.server.media import image
from tests.server.opened_app import OpenedApp, open_app

LORA_FILE = Path(kadr.__file__).parent / "assets" / "demo" / "demo-lora-teal.safetensors"
DEMO_FILE = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"
SETTINGS: dict[str, Any] = {
    "prompt": "a red circle | a blue ring",
    "size": (64, 64),
    "frames": 17,
    "fps": 12,
    "seed": 5,
    "steps": 1,
    "guidance": kadr.Guidance(cfg_scale=2.5),
    "windows": {"frames": 9, "overlap": 8},
}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an mp4 that was made elsewhere, with an image."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "photo.png").write_bytes(image())
    request = kadr.Request(**SETTINGS, conditions=[kadr.Condition(media=str(folder / "photo.png"), strength=0.5)])
    kadr.Engine.open("demo").write(request, folder / "made.mp4")
    return folder / "made.mp4"


BARE = {"schema": 1, "request": {"schema": 2, "prompt": "a"}}


def upload(app: OpenedApp, content: bytes) -> dict[str, Any]:
    """Uploads a file and returns the answer."""
    headers = {"content-type": "application/octet-stream", "host": HOST}
    answer = app.send("POST", "/v1/uploads", body=content, headers=headers, host=None)
    assert answer.status == 200, answer
    return answer.data


def test_upload_has_the_settings_that_made_it(local_app: OpenedApp, video: Path) -> None:
    answer = upload(local_app, video.read_bytes())
    assert answer["missing"] == ["photo.png"]
    settings = answer["settings"]
    assert settings["model"] == "demo"
    assert "conditions" not in settings
    created = local_app.send("POST", "/v1/videos", json_body=settings)
    assert created.status == 200, created
    again = created.data["request"]
    assert again.pop("windows").pop("anchor_strength") is None  # there is no image
    assert again == {name: value for name, value in settings.items() if name != "windows"} | {"priority": 0}
    assert settings["windows"]["frames"] == 9
    listed = local_app.send("GET", "/v1/uploads").data["data"]
    assert next(item for item in listed if item["id"] == answer["id"])["settings"] == settings


def test_model_that_is_not_here_is_named(tmp_path: Path, loop: Any, video: Path) -> None:
    with open_app(tmp_path, loop, models={"other": str(DEMO_FILE)}) as opened:
        answer = upload(opened, video.read_bytes())
    assert answer["missing"] == ["demo", "photo.png"]
    assert "model" not in answer["settings"]


def test_image_and_foreign_clip_have_no_settings(local_app: OpenedApp) -> None:
    answer = upload(local_app, image())
    assert (answer["settings"], answer["missing"]) == (None, [])


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Returns a function that changes what an mp4 stores, and keeps its length."""

    def run(content: bytes) -> bytes:
        start = content.index(b'{"kadr"')
        stored, length = json.JSONDecoder().raw_decode(content[start:].decode("utf-8", "replace"))
        stored["kadr"].pop("device")  # makes room
        text = json.dumps({"kadr": change(stored["kadr"]) or stored["kadr"]})
        assert len(text) <= length
        return content[:start] + text.ljust(length).encode() + content[start + length :]

    return run


@pytest.mark.parametrize(
    "change, missing",
    [
        (lambda stored: stored.update(schema=99), "schema number 99"),
        (lambda stored: stored["request"].update(schema=99), "schema number 99"),
        (lambda stored: stored["request"].update(fps=-1), "fps is -1"),
        (lambda stored: stored["request"].pop("prompt") and None, "prompt"),
        (lambda stored: {"schema": 1, "request": []}, "the request is []"),
        (lambda stored: stored["request"].update(prompt="\ud800"), "damaged"),
        (lambda stored: {**BARE, "loras": [{"path": "a", "strength": float("nan")}]}, "damaged"),
        (lambda stored: {**BARE, "loras": [{"path": "a", "strength": {}}]}, "the strength of a LoRA is {}"),
        (lambda stored: {**BARE, "loras": [{"path": 3, "strength": 1}]}, "the path of a LoRA"),
        (lambda stored: {**BARE, "loras": ["a"]}, "damaged"),
        (lambda stored: {**BARE, "loras": 3}, "damaged"),
    ],
)
def test_metadata_that_are_not_kadrs_are_no_settings(
    local_app: OpenedApp, video: Path, change: Callable[[dict[str, Any]], Any], missing: str
) -> None:
    answer = upload(local_app, changed(change)(video.read_bytes()))
    assert answer["settings"] is None
    assert [missing in line for line in answer["missing"]] == [True]


def test_loras_that_are_here_have_the_names_of_the_server(tmp_path: Path, loop: Any, video: Path) -> None:
    (tmp_path / "models" / "loras" / "style").mkdir(parents=True)
    for name in ("teal", "style/blue"):
        (tmp_path / "models" / "loras" / f"{name}.safetensors").write_bytes(LORA_FILE.read_bytes())
    loras = [
        {"path": "/home/x/teal.safetensors", "strength": 0.5, "second_strength": None},
        {"path": "C:\\loras\\blue.safetensors", "strength": 1, "second_strength": 2},
        {"path": "gone.safetensors", "strength": 1, "second_strength": None},
    ]
    content = changed(lambda stored: {**BARE, "loras": loras})(video.read_bytes())
    with open_app(tmp_path / "data", loop, models_dirs=(tmp_path / "models",)) as opened:
        answer = upload(opened, content)
        names = {item["id"] for item in opened.send("GET", "/v1/loras").data["data"]}
    assert answer["settings"]["loras"] == [
        {"name": "teal.safetensors", "strength": 0.5},
        {"name": "style/blue.safetensors", "strength": 1, "second_strength": 2},
    ]
    assert {lora["name"] for lora in answer["settings"]["loras"]} <= names
    assert answer["missing"] == ["gone"]


def stored_upload(metadata: dict[str, Any]) -> StoredUpload:
    """Returns an upload that stores this, and whose file is gone."""
    facts = {"width": 64, "height": 64, "upright_width": 64, "upright_height": 64, "frames": 9, "fps": 24.0}
    identity = {"id": "upload_" + 32 * "0", "owner": "", "kind": "clip", "bytes": 1, "sha256": "", "suffix": ".mp4"}
    return StoredUpload(**identity, **facts, created_at=0.0, metadata=json.dumps(metadata))  # type: ignore[arg-type]


def test_prompt_of_thousands_of_words_is_no_error(local_app: OpenedApp) -> None:
    stored = {"schema": 1, "request": {"schema": 2, "prompt": "ab " * 5000}}
    settings, missing = read_settings(local_app.state, LOCAL_CLIENT, stored_upload(stored))
    assert settings is not None
    assert missing == []


def test_settings_that_the_server_would_refuse_are_none(local_app: OpenedApp) -> None:
    sigmas = [1 - number / 2000 for number in range(1500)]
    stored = {"schema": 1, "request": {"schema": 2, "prompt": "a", "sigmas": sigmas}}
    settings, (message,) = read_settings(local_app.state, LOCAL_CLIENT, stored_upload(stored))
    assert settings is None
    assert message.startswith("sigmas: ")


def test_file_of_a_job_is_told_from_others_with_its_prompt(local_app: OpenedApp, video: Path) -> None:
    content = video.read_bytes()
    prompt, media = str(SETTINGS["prompt"]), [local_app.upload(image("PNG", *size)) for size in ((32, 48), (48, 32))]
    ids = []
    for number, reference in enumerate(media):
        video_id = local_app.submit(prompt=prompt, priority=100, conditions=[{"media": reference}])
        assert local_app.complete(content + bytes(number)).id == video_id  # as long as they differ in a byte
        ids.append(video_id)
    for number, video_id in enumerate(ids):
        answer = upload(local_app, content + bytes(number))
        assert answer["missing"] == []
        assert [item["media"] for item in answer["settings"]["conditions"]] == [f"{video_id}/0"]
