"""An mp4 that kadr made tells its settings when it is uploaded, and names what this server does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kadr
from tests.server.app_client import HOST
from tests.server.media import image
from tests.server.opened_app import OpenedApp, open_app

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
    ],
)
def test_metadata_that_are_not_kadrs_are_no_settings(
    local_app: OpenedApp, video: Path, change: Callable[[dict[str, Any]], Any], missing: str
) -> None:
    answer = upload(local_app, changed(change)(video.read_bytes()))
    assert answer["settings"] is None
    assert [missing in line for line in answer["missing"]] == [True]
