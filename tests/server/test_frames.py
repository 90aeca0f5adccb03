"""The frames that come out of the server are those of `kadr generate`; extensions and edits keep what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from kadr.media.clip import read_video
from tests.page_commands import run_in_process
from tests.server.client_server import (
    PROMPT,
    ServerProcess,
    answer_of,
    frames_of,
    make_video,
    psnr,
    wait_until_finished,
)

SHAPE = {"size": "128x128", "num_frames": 25}


@pytest.fixture(scope="module")
def source(server: ServerProcess) -> dict[str, Any]:
    """Returns a video of good quality: a circle that moves."""
    with server.client() as client:
        return make_video(client, **SHAPE, num_inference_steps=12, seed=1)


def download(client: httpx2.Client, video: dict[str, Any], folder: Path) -> np.ndarray:
    return frames_of(client.get(f"/v1/videos/{video['id']}/content").content, folder)


def finish(client: httpx2.Client, response: httpx2.Response) -> dict[str, Any]:
    video = wait_until_finished(client, answer_of(response)["id"])[-1]
    assert video["status"] == "completed", video["error"]
    return video


def centers(frames: np.ndarray, channel: int) -> np.ndarray:
    """Returns the x at which each frame has a colour, its centre of mass."""
    brightness = frames[..., channel].astype(float).sum(1)
    return (brightness * np.arange(frames.shape[2])).sum(1) / brightness.sum(1)


def test_server_makes_the_frames_of_generate(client: httpx2.Client, source: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "generated.mp4"
    flags = ["--size", "128x128", "--frames", "25", "--steps", "12", "--seed", "1", "--output", str(output)]
    call = run_in_process(["generate", PROMPT, *flags])
    assert call.code == 0, call.err
    assert (download(client, source, tmp_path) == read_video(output).frames).all()


def test_file_of_a_video_tells_how_it_was_made_but_not_where(
    client: httpx2.Client, source: dict[str, Any], server: ServerProcess, tmp_path: Path
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(client.get(f"/v1/videos/{source['id']}/content").content)
    call = run_in_process(["inspect", str(path), "--json"])
    assert call.code == 0, call.err
    assert json.loads(call.out)["request"]["prompt"] == PROMPT
    assert str(server.folder).encode() not in path.read_bytes()


def test_settings_of_a_video_make_it_again(client: httpx2.Client, source: dict[str, Any], tmp_path: Path) -> None:
    again = finish(client, client.post("/v1/videos", json=source["request"]))
    assert again["id"] != source["id"]
    assert (download(client, again, tmp_path) == download(client, source, tmp_path)).all()


def test_extension_begins_with_the_frames_of_its_source(
    client: httpx2.Client, source: dict[str, Any], tmp_path: Path
) -> None:
    body = {"prompt": PROMPT, "video": {"id": source["id"]}, "seconds": 1, "num_inference_steps": 12, "seed": 2}
    extension = finish(client, client.post("/v1/videos/extensions", json=body))
    frames, expected = download(client, extension, tmp_path), download(client, source, tmp_path)
    assert len(frames) == extension["num_frames"] == 25 + 24
    assert float(extension["seconds"]) == pytest.approx(49 / 24, abs=0.01)
    assert psnr(frames[:25], expected) > 30
    assert psnr(frames[24:25], frames[48:]) < 25  # and goes on


def test_edit_keeps_the_motion_of_its_source(client: httpx2.Client, source: dict[str, Any], tmp_path: Path) -> None:
    prompt = "a blue circle moving right on a black background"
    body = {"prompt": prompt, "video": source["id"], "num_inference_steps": 12, "denoise_strength": 0.95}
    edit = finish(client, client.post("/v1/videos/edits", json=body))
    frames, expected = download(client, edit, tmp_path), download(client, source, tmp_path)
    assert frames.shape == expected.shape
    way, expected_way = centers(frames, 2), centers(expected, 0)
    assert np.abs(way - expected_way).max() < 9
    assert expected_way[-1] - expected_way[0] > 20


def test_content_comes_in_ranges(client: httpx2.Client, source: dict[str, Any]) -> None:
    path = f"/v1/videos/{source['id']}/content"
    whole = client.get(path)
    assert whole.headers["accept-ranges"] == "bytes"
    part = client.get(path, headers={"range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, whole.content[4:12])
    assert part.headers["content-range"] == f"bytes 4-11/{len(whole.content)}"
    assert client.get(path, headers={"range": f"bytes={len(whole.content)}-"}).status_code == 416


def test_sync_answers_with_the_file(client: httpx2.Client, source: dict[str, Any], tmp_path: Path) -> None:
    body = {"prompt": PROMPT, **SHAPE, "num_inference_steps": 12, "seed": 1}
    answer = client.post("/v1/videos/sync", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert (frames_of(answer.content, tmp_path) == download(client, source, tmp_path)).all()
    assert answer_of(client.get(f"/v1/videos/{answer.headers['x-video-id']}"))["status"] == "completed"
