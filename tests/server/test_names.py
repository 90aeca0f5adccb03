"""Names that a client sends never reach the file system, however they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from kadr.server.inputs import media_sources
from tests.server.answers import MARKER, refused
from tests.server.app_client import multipart
from tests.server.media import image
from tests.server.opened_app import ADMIN, ANNA, SMALL, OpenedApp
from tests.server.routes import UNKNOWN_UPLOAD, UNKNOWN_VIDEO

CLIMBING = (
    *(
        "..",
        "../..",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "//etc/passwd",
        "./secret",
        "~/.ssh/id_rsa",
        "~root",
    ),
    *(
        "..\\..\\secret",
        "\\\\server\\share",
        "C:\\Windows\\win.ini",
        "C:secret",
        "file:///etc/passwd",
        "secret",
        "jobs",
    ),
    *("jobs.sqlite", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "%252e%252e%252f", "..%c0%af..", "..;/", "....//", "..\0"),
    *(
        "secret\0.png",
        "\0",
        "．．／etc",
        "‥/‥",
        "∕etc∕passwd",
        "\u202e",
        "nul",
        "con.png",
        "aux",
        "a" * 300,
        "a/" * 300,
    ),
    *("/dev/zero", "/proc/self/environ", "http://127.0.0.1/", "*", "?", "$HOME", "`id`", "'; DROP TABLE jobs; --", " "),
    *(UNKNOWN_VIDEO + "/..", UNKNOWN_UPLOAD + "/media.png", UNKNOWN_VIDEO.upper(), UNKNOWN_VIDEO + "\n", ""),
    *("video_" + "../" * 10 + "xx", "upload_" + "../" * 10 + "xx", "video_" + "g" * 32, "video_" + "0" * 31),
)


@pytest.fixture(scope="module", autouse=True)
def completed(app: OpenedApp) -> str:
    """Id of a completed video of Anna's that has an image."""
    return app.add_completed(ANNA, input_reference={"file_id": app.upload(image(), ANNA)})


@pytest.mark.parametrize("name", CLIMBING)
def test_ids_in_paths_never_climb(app: OpenedApp, name: str) -> None:
    with app.unchanged():
        for written in {quote(name, safe=""), quote(quote(name, safe=""), safe=""), quote(name, safe="/:\\%")}:
            for address in (f"/v1/videos/{written}", f"/v1/videos/{written}/content", f"/v1/videos/{written}/events"):
                answer = app.send("GET", address, token=ADMIN)
                assert answer.status in (404, 405) or written == ""
            for method, address in (("DELETE", "/v1/videos/"), ("DELETE", "/v1/uploads/"), ("GET", "/v1/models/")):
                assert app.send(method, address + written, token=ADMIN).status in (404, 405)
            assert app.send("POST", f"/v1/videos/{written}/cancel", token=ADMIN).status in (404, 405)


@pytest.mark.parametrize("name", [name for name in CLIMBING if name])
@pytest.mark.parametrize("medium", ["reference", "file_id", "id", "condition", "control", "input_video", "video"])
def test_references_to_media_never_climb(app: OpenedApp, completed: str, name: str, medium: str) -> None:
    fields: dict[str, Any] = {
        "reference": {"input_reference": name},
        "file_id": {"input_reference": {"file_id": name}},
        "id": {"input_reference": {"id": name}},
        "condition": {"conditions": [{"media": name}]},
        "control": {"controls": [{"media": name}]},
        "input_video": {"input_video": name},
        "video": {"video": {"id": name}},
    }[medium]
    path = "/v1/videos/edits" if medium == "video" else "/v1/videos"
    with app.unchanged():
        body = {"prompt": "x"} if medium == "video" else SMALL
        refused(app.send("POST", path, token=ANNA, json_body={**body, **fields}), (400, 404))
        if medium == "id":  # behind an id that is one
            reference = f"{completed}/{name}"
            refused(app.send("POST", path, token=ANNA, json_body={**SMALL, "input_reference": reference}), (400, 404))


@pytest.mark.parametrize("name", [name for name in CLIMBING if name.strip()])
def test_names_of_models_and_loras_never_climb(app: OpenedApp, name: str) -> None:
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, "model": name}), 404, "model_not_found")
        for loras in ({"lora": name}, {"lora": {"name": name}}, {"loras": [name]}, {"loras": [{"name": name}]}):
            answer = app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, **loras})
            refused(answer, 404, "lora_not_found")


@pytest.mark.parametrize("name", CLIMBING)
def test_other_names_are_refused(app: OpenedApp, completed: str, name: str) -> None:
    own, written = app.submit(ANNA), quote(name, safe="")
    with app.unchanged():
        answer = app.send("GET", f"/v1/videos/{completed}/content?variant={written}", token=ANNA)
        refused(answer, 400, "invalid_value")
        refused(app.send("GET", f"/v1/videos?after={written}", token=ANNA), 400)
        for query in ("limit", "order", "status"):
            refused(app.send("GET", f"/v1/videos?{query}={written}", token=ANNA), 400, "invalid_value")
        moved = app.send("POST", f"/v1/videos/{own}/move", token=ANNA, json_body={"before": name})
        refused(moved, 404, "video_not_found")
        for field in ("sampler", "size", "cache", "seconds"):
            answer = app.send("POST", "/v1/videos", token=ANNA, json_body={"prompt": "x", field: name})
            refused(answer, 400)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "C:\\x", "x\0y", "..%2f", "a" * 5000, "\u202e", "nul"])
def test_file_names_of_forms_are_not_used(app: OpenedApp, name: str) -> None:
    before = set(app.folder.rglob("*"))
    body, headers = multipart(("file", image(), name))
    answer = app.send("POST", "/v1/uploads", token=ANNA, body=body, headers=headers)
    new = {path.name for path in set(app.folder.rglob("*")) - before}
    if len(name) > 1000:
        refused(answer, 400, "invalid_body")
        assert not new
    else:
        assert new == {answer.data["id"], "media.png", "upload.json"}


@pytest.mark.parametrize("name", ["event", "last-event-id", "idempotency-key", "range", "if-range", "accept"])
@pytest.mark.parametrize(
    "value", ["../../etc/passwd", "\0", "\x1b[2J", "é" * 50, "x" * 5000, "", "'; --", "-1", "9" * 99]
)
def test_values_of_headers_are_harmless(app: OpenedApp, completed: str, name: str, value: str) -> None:
    headers = {name: value}
    app.send("GET", f"/v1/videos/{completed}/content", token=ANNA, headers=headers)
    app.send("GET", "/v1/events?wait=false", token=ANNA, headers=headers)
    with app.unchanged():
        app.send("POST", "/v1/videos", token=ANNA, json_body={"prompt": "x", "size": "no"}, headers=headers)


@pytest.mark.parametrize(
    "text", ["x\r\nset-cookie: a=b", "x\nlocation: http://evil", "\r\n\r\n<script>", "%0d%0aset-cookie:a"]
)
def test_no_header_of_an_answer_can_be_injected(app: OpenedApp, text: str) -> None:
    written = quote(text, safe="")
    addresses = (f"/v1/videos/{written}", f"/v1/models/{written}", f"/{written}", f"/v1/videos?after={written}")
    for address in addresses:
        answer = app.send("GET", address, token=ANNA)
        assert {name for name, _ in answer.headers} <= {"content-length", "content-type", "x-content-type-options"}
    answer = app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, "model": text})
    assert {name for name, _ in answer.headers} <= {"content-length", "content-type", "x-content-type-options"}


def test_prompt_cannot_write_lines_into_the_log(app: OpenedApp) -> None:
    app.lines.clear()
    app.submit(ANNA, prompt="x\n2026-01-01 all is lost\x1b[2J\u202e")
    (line,) = app.lines
    assert line.isprintable()


def test_only_files_of_the_server_are_opened(app: OpenedApp, completed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linked: list[Path] = []
    original = os.link
    monkeypatch.setattr(
        media_sources.os, "link", lambda source, target: linked.append(source) or original(source, target)
    )
    upload = app.upload(image(), ANNA)
    app.submit(ANNA, conditions=[{"media": upload}, {"media": completed + "/0", "frame": 8}])
    assert len(linked) == 2
    assert all(MARKER in str(path) for path in linked)
