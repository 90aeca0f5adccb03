"""A server in a process of its own, with the operator's models and tokens: no answer says where they lie."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kadr.server.auth import new_token
from tests.page_commands import ROOT
from tests.server.answers import MARKER, Answer, check_answer, refused
from tests.server.app_client import multipart
from tests.server.client_server import PROMPT, ServerProcess, read_events
from tests.server.media import clip, image, png
from tests.server.raw_http import RawServer, head
from tests.server.routes import ROUTES, fill

DEMO = ROOT / "src" / "kadr" / "assets" / "demo"
MODEL, LORA = "my model.safetensors", "teal.safetensors"
SMALL = {"prompt": PROMPT, "size": "64x64", "num_frames": 9, "num_inference_steps": 2}


@dataclass
class Operated:
    """A server with models, tokens of an admin and of two clients, and all that it has answered."""

    process: ServerProcess
    folder: Path
    tokens: dict[str, str]

    @property
    def roots(self) -> tuple[str, ...]:
        return str(self.folder), str(ROOT), os.path.expanduser("~") + os.sep

    def send(self, method: str, path: str, name: str | None = "anna", **arguments: Any) -> Answer:
        """Returns the answer to a request of a client, once it has been checked."""
        headers = {"authorization": f"Bearer {self.tokens[name]}"} if name is not None else {}
        headers |= arguments.pop("headers", {})
        with self.process.client() as client:
            response = client.request(method, path, headers=headers, **arguments)
        answer = Answer(response.status_code, list(response.headers.items()), response.content)
        return check_answer(answer, self.roots)

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Submits a video, follows it to its end, and returns it."""
        body = {**SMALL, **fields}
        video = self.send("POST", "/v1/videos", json=body).data
        headers = {"authorization": f"Bearer {self.tokens['anna']}"}
        with (
            self.process.client() as client,
            client.stream("GET", f"/v1/videos/{video['id']}/events", headers=headers) as stream,
        ):
            for event in read_events(stream):
                text = json.dumps(event.data)
                assert not [root for root in (MARKER, *self.roots) if root in text], event
        return self.send("GET", f"/v1/videos/{video['id']}").data


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated") / MARKER
    for kind, source, name in (
        ("checkpoints", "demo.safetensors", MODEL),
        ("loras", "demo-lora-teal.safetensors", LORA),
        ("text_encoders", "text_encoder", "encoder"),
        ("text_encoders", "tokenizer", "tokenizer"),
    ):
        target = folder / "models" / kind / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (DEMO / source).is_dir():
            shutil.copytree(DEMO / source, target)
        else:
            shutil.copyfile(DEMO / source, target)
    shutil.copyfile(DEMO / "demo-lora-teal.safetensors", folder / "secret.safetensors")
    (folder / "models" / "loras" / "link.safetensors").symlink_to(folder / "secret.safetensors")
    made = {name: new_token(name, is_admin=name == "admin") for name in ("admin", "anna", "ben")}
    (folder / "tokens.toml").write_text("\n".join(lines for _, lines in made.values()))
    arguments = ("--models-dir", str(folder / "models"), "--tokens", str(folder / "tokens.toml"), "--hide-prompts")
    options = ("--model", MODEL, "--text-encoder", str(folder / "models" / "text_encoders" / "encoder"))
    process = ServerProcess(folder / "data", (*arguments, *options, "--max-upload-mb", "1")).start()
    yield Operated(process, folder, {name: token for name, (token, _) in made.items()})
    assert process.stop() == 0, process.log()


@pytest.fixture(scope="module")
def video(operated: Operated) -> dict[str, Any]:
    """A completed video with an image and a LoRA."""
    upload = operated.send("POST", "/v1/uploads", content=image()).data["id"]
    fields = {"model": MODEL, "lora": LORA, "input_reference": {"file_id": upload}, "controls": []}
    video = operated.finish(**fields)
    assert video["status"] == "completed", video["error"]
    return video


def test_no_file_that_a_client_gets_says_where_things_lie(operated: Operated, video: dict[str, Any]) -> None:
    for variant in ("video", "thumbnail", "spritesheet"):
        content = operated.send("GET", f"/v1/videos/{video['id']}/content?variant={variant}").body
        assert len(content) > 500
        for root in (MARKER, *operated.roots):
            assert root.encode() not in content
            assert json.dumps(root)[1:-1].encode() not in content


def test_no_route_says_where_things_lie(operated: Operated, video: dict[str, Any]) -> None:
    for method, path in ROUTES:
        if (method, path) not in (("DELETE", "/v1/videos/{video_id}"), ("GET", "/v1/events")):
            for name in ("admin", "anna"):
                operated.send(method, fill(path, video["id"]), name, json={} if method == "POST" else None)
    assert operated.send("POST", "/v1/queue/resume", "admin").status == 200
    shown = operated.send("GET", "/v1/models").data["data"]
    assert [model["id"] for model in shown] == [MODEL]
    assert operated.send("GET", f"/v1/models/{MODEL}").data["recipe"]["size"]


def test_error_of_a_worker_does_not_say_where_things_lie(operated: Operated) -> None:
    """An image whose header is good and whose pixels are not fails where it is decoded: in the worker."""
    upload = operated.send("POST", "/v1/uploads", content=png(64, 64, pixels=b"not deflated")).data["id"]
    video = operated.finish(input_reference={"file_id": upload})
    assert video["status"] == "failed"
    assert video["error"]["code"] == "invalid_media"
    assert "0.png" in video["error"]["message"]
    synced = operated.send("POST", "/v1/videos/sync", json={**SMALL, "input_reference": {"file_id": upload}})
    refused(synced, 422, "invalid_media")


@pytest.mark.parametrize(
    "name",
    ["../../secret", "../../secret.safetensors", "link.safetensors", "link", "../loras/" + LORA, "./" + LORA]
    + [LORA + "/", "/" + LORA, "../../data/secret", f"..\\loras\\{LORA}", "../checkpoints/" + MODEL, MODEL],
)
def test_names_lead_to_nothing_beside_the_operators_folders(operated: Operated, name: str) -> None:
    refused(operated.send("POST", "/v1/videos", json={**SMALL, "lora": name}), 404, "lora_not_found")
    assert operated.send("GET", "/v1/loras").data["data"] == [{"id": LORA, "object": "lora"}]
    if name != MODEL:
        refused(operated.send("POST", "/v1/videos", json={**SMALL, "model": name}), 404, "model_not_found")


def test_log_has_no_token_and_no_prompt(operated: Operated, video: dict[str, Any]) -> None:
    log = operated.process.log()
    assert video["id"] in log
    assert PROMPT not in log
    assert not [token for token in operated.tokens.values() if token in log]
    assert "Traceback" not in log


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_data_are_for_their_user_alone(operated: Operated) -> None:
    data = operated.folder / "data"
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "secret").stat().st_mode) == 0o600


def test_large_files_are_refused_with_an_answer(operated: Operated) -> None:
    """A client that sends all before it reads must still be told, not just cut off."""
    large = clip() + bytes(3 << 20)
    refused(operated.send("POST", "/v1/uploads", content=large), 413, "too_large")
    refused(operated.send("POST", "/v1/uploads", content=iter([large[:1000], large[1000:]])), 413, "too_large")
    body, headers = multipart(("prompt", b"x"), ("input_reference", large, "x.mp4"))
    refused(operated.send("POST", "/v1/videos", content=body, headers=headers), 413, "too_large")
    refused(operated.send("POST", "/v1/uploads", None, content=large), 401, "invalid_token")
    assert operated.send("GET", "/v1/uploads", "ben").data["data"] == []


def test_others_are_served_while_a_client_attacks(operated: Operated) -> None:
    """Slow heads, slow bodies, hostile files and large JSON at the same time: a GET takes less than a second."""
    port = int(operated.process.address.rpartition(":")[2])
    raw = RawServer(port)
    token = f"Authorization: Bearer {operated.tokens['anna']}"
    attackers = [raw.connect() for _ in range(60)]
    try:
        for number, attacker in enumerate(attackers):
            lines = (token, "Content-Type: application/json", "Content-Length: 900000")
            start = (head("POST", "/v1/videos", *lines) + b'{"prompt": [' + b"[]," * 10_000, b"GET / HT", b"")
            attacker.sendall(start[number % 3])
        began = time.monotonic()
        for _ in range(20):
            assert operated.send("GET", "/v1/queue", "ben").status == 200
        assert time.monotonic() - began < 20
    finally:
        for attacker in attackers:
            attacker.close()


def test_stop_does_not_wait_for_those_who_hang_on(tmp_path: Path) -> None:
    process = ServerProcess(tmp_path / "data", environment={"KADR_TOKEN": "the-only-token-there-is"}).start()
    raw = RawServer(int(process.address.rpartition(":")[2]))
    token = "Authorization: Bearer the-only-token-there-is"
    streams = [raw.connect() for _ in range(3)]
    for stream, start in zip(
        streams,
        (head("GET", "/v1/events", token), b"GET / HT", head("POST", "/v1/videos", token, "Content-Length: 9")),
        strict=True,
    ):
        stream.sendall(start)
    time.sleep(0.2)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(process.address.replace("127.0.0.1", "127.0.0.2"))  # it listens where it was told
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 15
    assert "Traceback" not in process.log()
    for stream in streams:
        stream.close()
