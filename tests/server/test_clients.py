"""Clients that people have work with the server as they are: `openai` for Python and Node, LiteLLM, n8n, aiperf."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from tests.server.client_server import (
    PROMPT,
    TINY,
    ServerProcess,
    answer_of,
    create_video,
    frames_of,
    make_video,
    png,
    psnr,
    wait_until_finished,
)

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")
NODE_SCRIPT = Path(__file__).parent / "node" / "client.cjs"
NODE = shutil.which("node") or shutil.which("node", path=str(Path(sys.executable).parent))
NODE_MODULES = Path(sys.prefix) / "node" / "node_modules"  # the Makefile installs them
OPENAI_SIZES = ("720x1280", "1280x720", "1024x1792", "1792x1024")
SETTINGS = {key: value for key, value in TINY.items() if key != "size"}


@pytest.fixture(scope="module")
def paused_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a token that begins no video and lets three wait."""
    folder = tmp_path_factory.mktemp("paused") / "data"
    arguments = ("--paused", "--max-queued", "3")
    server = ServerProcess(folder, arguments, {"KADR_TOKEN": "a token for the tests"}).start()
    yield server
    assert server.stop() == 0, server.log()


@pytest.fixture(scope="module")
def sdk(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def video(sdk: openai.OpenAI) -> Any:
    return sdk.videos.create_and_poll(
        prompt=PROMPT, model="sora-2", size="64x64", extra_body={**SETTINGS, "seed": 5}, poll_interval_ms=50
    )


def poll(sdk: openai.OpenAI, video: Any) -> Any:
    return sdk.videos.poll(video.id, poll_interval_ms=50)


def test_openai_creates_and_polls_a_video_with_true_fields(sdk: openai.OpenAI, video: Any) -> None:
    assert (video.status, video.progress, video.error, video.object) == ("completed", 100, None, "video")
    assert (video.model, video.size, video.seconds, video.prompt) == ("demo", "64x64", "0.38", PROMPT)
    assert (video.num_frames, video.fps, video.seed) == (9, 24.0, 5)
    assert type(video.created_at) is type(video.completed_at) is int
    assert video.created_at <= video.completed_at
    assert sdk.videos.retrieve(video.id).to_dict() | {"url": 0, "thumbnail_url": 0} == video.to_dict() | {
        "url": 0,
        "thumbnail_url": 0,
    }


def test_openai_polls_at_the_pace_the_server_asks_for(sdk: openai.OpenAI) -> None:
    raw = sdk.videos.with_raw_response.create(prompt=PROMPT, size="64x64", extra_body=SETTINGS)
    assert 100 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
    assert raw.parse().status == "queued"
    assert poll(sdk, raw.parse()).status == "completed"


def test_openai_downloads_every_variant(sdk: openai.OpenAI, video: Any, tmp_path: Path) -> None:
    content = sdk.videos.download_content(video.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert frames_of(content.read(), tmp_path).shape == (9, 64, 64, 3)
    sizes = {"thumbnail": (64, 64), "spritesheet": (5 * 64, 2 * 64)}
    for variant, size in sizes.items():
        content = sdk.videos.download_content(video.id, variant=variant)
        assert content.response.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(content.read())).size == size


def test_openai_begins_a_video_with_a_file_or_a_reference(sdk: openai.OpenAI, tmp_path: Path) -> None:
    def create(seed: int, **fields: Any) -> Any:
        extra_body = {**SETTINGS, "seed": seed, **fields.pop("extra_body", {})}
        made = poll(sdk, sdk.videos.create(prompt=PROMPT, size="128x128", extra_body=extra_body, **fields))
        return frames_of(sdk.videos.download_content(made.id).read(), tmp_path)[0]

    image, buffer = create(seed=5), io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    upload = answer_of(httpx2.post(f"{sdk.base_url}uploads", files={"file": ("first.png", buffer.getvalue())}))
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    by_file = create(seed=6, input_reference=("first.png", buffer.getvalue(), "image/png"))
    by_id = create(seed=6, extra_body={"input_reference": {"file_id": upload["id"]}})
    by_url = create(seed=6, extra_body={"input_reference": {"image_url": url}})
    assert psnr(create(seed=6), image) < 18
    assert psnr(by_file, image) > 24
    assert (by_id == by_file).all()
    assert (by_url == by_file).all()


def test_openai_sends_objects_and_lists_in_extra_body(sdk: openai.OpenAI) -> None:
    """The client flattens them into fields with brackets, all `media` before all `frame`."""
    upload = answer_of(httpx2.post(f"{sdk.base_url}uploads", files={"file": ("red.png", png("red"))}))
    conditions = [{"media": upload["id"], "frame": 0}, {"media": upload["id"], "frame": 8}]
    extra = {"sigmas": [1.0, 0.5], "guidance": {"cfg_scale": 2.0, "cfg_star": True}, "conditions": conditions}
    settings = {"num_frames": 9, "negative_prompt": "42", **extra}
    made = poll(sdk, sdk.videos.create(prompt="7", size="64x64", extra_body=settings))
    assert made.status == "completed"
    request = made.request
    assert (made.prompt, request["negative_prompt"], request["sigmas"]) == ("7", "42", [1.0, 0.5])
    assert request["guidance"] == {"cfg_scale": 2.0, "cfg_star": True}
    shown = [(item["media"], item["frame"]) for item in request["conditions"]]
    assert shown == [(f"{made.id}/0", 0), (f"{made.id}/0", 8)]


def test_openai_lists_all_videos_page_by_page(sdk: openai.OpenAI, client: httpx2.Client) -> None:
    ids = [create_video(client)["id"] for _ in range(3)]
    page = sdk.videos.list(limit=2)
    assert [item.id for item in page.data] == ids[:0:-1]
    assert page.has_more
    listed = [item.id for item in sdk.videos.list(limit=2)]
    assert listed[:3] == ids[::-1]
    assert len(set(listed)) == len(listed)
    assert [item.id for item in sdk.videos.list(limit=2, order="asc")] == listed[::-1]
    assert [item.id for item in sdk.videos.list(after=ids[1], limit=100)] == listed[2:]


def test_openai_deletes_a_video_for_good(sdk: openai.OpenAI, client: httpx2.Client) -> None:
    video_id = make_video(client)["id"]
    reply = sdk.videos.delete(video_id)
    assert (reply.id, reply.deleted, reply.object) == (video_id, True, "video.deleted")
    for gone in (sdk.videos.retrieve, sdk.videos.delete, sdk.videos.download_content):
        with pytest.raises(openai.NotFoundError) as caught:
            gone(video_id)
        assert caught.value.code == "video_not_found"


def test_openai_remixes_with_the_same_seed(sdk: openai.OpenAI, video: Any) -> None:
    remix = poll(sdk, sdk.videos.remix(video.id, prompt="a blue square on a gray background"))
    assert (remix.status, remix.prompt, remix.seed) == ("completed", "a blue square on a gray background", video.seed)
    assert remix.remixed_from_video_id == video.id
    assert (remix.size, remix.seconds) == (video.size, video.seconds)


def test_openai_edits_and_extends_a_video_by_id_and_by_file(sdk: openai.OpenAI, video: Any) -> None:
    """The client refuses the reference that its types allow, so an id goes through `extra_body`."""
    by_id = {"video": {"id": video.id}}
    content = sdk.videos.download_content(video.id).read()
    edits = [
        sdk.videos.edit(prompt=PROMPT, video=openai.omit, extra_body=by_id),
        sdk.videos.edit(prompt=PROMPT, video=("a.mp4", content), extra_body={"num_frames": 7}),
    ]
    extensions = [
        sdk.videos.extend(prompt=PROMPT, seconds="1", video=openai.omit, extra_body=by_id),
        sdk.videos.extend(prompt=PROMPT, seconds="0.5", video=("a.mp4", content)),
    ]
    finished = [poll(sdk, job) for job in (*edits, *extensions)]
    assert {job.status for job in finished} == {"completed"}
    assert [job.num_frames for job in finished] == [9, 7, 9 + 24, 9 + 12]
    assert [job.seconds for job in finished] == ["0.38", "0.29", "1.38", "0.88"]
    assert [job.remixed_from_video_id for job in finished] == [video.id, None, video.id, None]


def test_openai_raises_its_own_errors(sdk: openai.OpenAI, paused_server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.videos.create(prompt=PROMPT, extra_body={"colour": "red"})
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "unknown_parameter",
        "colour",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.videos.list(after="video_that_is_not")
    assert caught.value.param == "after"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.videos.create(prompt=PROMPT, model="no-such-model")
    assert caught.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(base_url=f"{paused_server.address}/v1").videos.list()


def test_openai_is_told_when_a_full_queue_may_have_room(paused_server: ServerProcess) -> None:
    base_url = f"{paused_server.address}/v1"
    sdk = openai.OpenAI(base_url=base_url, api_key="a token for the tests", max_retries=0)
    ids = [sdk.videos.create(prompt=PROMPT).id for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as caught:
        sdk.videos.create(prompt=PROMPT)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError) as early:
        sdk.videos.download_content(ids[0])
    assert early.value.code == "video_not_ready"
    for video_id in ids:
        sdk.videos.delete(video_id)


@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.parametrize("package", ["openai", "openai-json"])
def test_openai_for_node_makes_and_remixes_a_video(server: ServerProcess, package: str) -> None:
    """`openai-json` is an older version of it, which sends JSON where there is no file."""
    assert NODE_MODULES.is_dir(), f"{NODE_MODULES} is missing: `make` installs it"
    process = subprocess.run(
        [str(NODE), str(NODE_SCRIPT), package, f"{server.address}/v1", PROMPT],
        env={**os.environ, "NODE_PATH": str(NODE_MODULES)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    output = json.loads(process.stdout)
    assert (output["created"]["status"], output["created"]["error"]) == ("queued", None)
    assert (output["video"]["status"], output["video"]["size"], output["video"]["seed"]) == ("completed", "64x64", 3)
    assert (output["content"], output["type"]) == ("ftyp", "video/mp4")
    assert (output["thumbnail"], output["remix"]["remixed_from_video_id"]) == ("image/jpeg", output["video"]["id"])
    assert output["video"]["id"] in output["listed"]
    assert output["deleted"] == {"id": output["video"]["id"], "object": "video.deleted", "deleted": True}
    assert output["status_of_deleted"] == 404


def test_litellm_requests_are_understood(client: httpx2.Client) -> None:
    body = {"model": "sora-2", "prompt": PROMPT, "seconds": "0.3", "size": "64x64"}
    created = answer_of(client.post("/v1/videos", json=body, headers={"authorization": "Bearer sk-none"}))
    finished = wait_until_finished(client, created["id"])[-1]
    assert (type(finished["seconds"]), type(finished["progress"]), finished["error"]) == (str, int, None)
    content = client.get(f"/v1/videos/{created['id']}/content", params={"video_id": created["id"]})
    assert (content.status_code, content.content[4:8]) == (200, b"ftyp")
    image = {"input_reference": ("input_reference.png", png("red"), "image/png")}
    with_image = answer_of(client.post("/v1/videos", data=body, files=image))
    assert with_image["request"]["conditions"][0]["media"] == f"{with_image['id']}/0"
    remix = answer_of(client.post(f"/v1/videos/{created['id']}/remix", json={"prompt": "a blue circle"}))
    assert remix["remixed_from_video_id"] == created["id"]
    page = answer_of(client.get("/v1/videos", params={"limit": "2", "order": "desc", "after": remix["id"]}))
    assert [item["id"] for item in page["data"]] == [with_image["id"], created["id"]]
    assert answer_of(client.delete(f"/v1/videos/{created['id']}"))["deleted"] is True


@pytest.mark.parametrize("size", OPENAI_SIZES)
def test_n8n_requests_are_understood(paused_server: ServerProcess, size: str) -> None:
    """It asks for sora-2 at one of four sizes, in a form, and gives up where `error` is anything but null."""
    with paused_server.client(authorization="Bearer a token for the tests") as client:
        form = {"model": "sora-2", "prompt": "A video of a cat playing with a ball", "seconds": "4", "size": size}
        image = {"input_reference": ("image.png", png("gray", (120, 80)), "image/png")}
        video = answer_of(client.post("/v1/videos", data=form, files=image))
        assert (video["model"], video["size"], video["seconds"], video["num_frames"]) == ("demo", size, "4", 96)
        video = answer_of(client.get(f"/v1/videos/{video['id']}"))
        assert (video["status"], video["error"]) == ("queued", None)
        answer_of(client.delete(f"/v1/videos/{video['id']}"))


def test_aiperf_requests_are_understood(client: httpx2.Client) -> None:
    """It asks ten times a second, and fetches `url` without its token."""
    body = {"prompt": PROMPT, "model": "demo", "size": "64x64", "seconds": 1, "seed": 1, "num_inference_steps": 2}
    headers = {"accept": "application/json"}
    video = answer_of(client.post("/v1/videos", json={**body, "guidance_scale": 1.0, "fps": 9}, headers=headers))
    while video["status"] not in ("completed", "failed"):
        time.sleep(0.1)
        video = answer_of(client.get(f"/v1/videos/{video['id']}", headers=headers))
    assert (video["status"], video["progress"], video["seconds"]) == ("completed", 100, "1")
    assert video["inference_time_s"] > 0
    content = httpx2.get(video["url"])
    assert (content.status_code, content.headers["content-type"], content.content[4:8]) == (200, "video/mp4", b"ftyp")
    form = {key: str(value) for key, value in body.items()}
    assert answer_of(client.post("/v1/videos", files={key: (None, value) for key, value in form.items()}))["seed"] == 1


def test_head_of_a_file_is_that_of_the_whole_answer(server: ServerProcess) -> None:
    with server.client() as client:
        video = make_video(client)
        head, whole = (client.request(method, f"/v1/videos/{video['id']}/content") for method in ("HEAD", "GET"))
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(whole.content))
        assert head.headers["etag"] == whole.headers["etag"]


def test_video_in_progress_has_a_preview_that_moves(server: ServerProcess) -> None:
    with server.client() as client:
        video = create_video(client, size="128x128", num_frames=49, num_inference_steps=24)
        while (now := answer_of(client.get(f"/v1/videos/{video['id']}")))["preview_url"] is None:
            assert now["status"] in ("queued", "in_progress"), now
            time.sleep(0.05)
        by_url, by_path = client.get(now["preview_url"]), client.get(f"/v1/videos/{video['id']}/preview")
        answer_of(client.post(f"/v1/videos/{video['id']}/cancel"))
        cancelled = wait_until_finished(client, video["id"])[-1]
        assert cancelled["preview_url"] is None
        assert client.get(f"/v1/videos/{video['id']}/preview").json()["error"]["code"] == "preview_not_found"
    for answer in (by_url, by_path):
        assert answer.headers["content-type"] == "image/webp"
        image = Image.open(io.BytesIO(answer.content))
        assert (image.size, image.n_frames) == ((32, 32), 7)
