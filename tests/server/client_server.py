"""A server in a process of its own on the demo model, as clients meet it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from kadr.media.clip import read_video
from tests.page_commands import ROOT

PROMPT = "a red circle moving right on a black background"
TINY: Mapping[str, Any] = {"size": "64x64", "num_frames": 9, "num_inference_steps": 2}
MAX_SECONDS = 60.0


@dataclass
class ServerProcess:
    """`kadr serve` on a folder, which may be stopped and started again.

    Args:
        folder: of its queue.
        arguments: further ones of the command.
        environment: further variables.
    """

    folder: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str = field(default="", init=False)

    def start(self) -> ServerProcess:
        """Starts the process and waits until it listens."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kadr", "serve", "--data", str(self.folder), "--port", "0", *self.arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().decode().strip()
        assert self.address.startswith("http://"), self.log()
        return self

    def stop(self) -> int:
        """Stops the process as an operator does, and returns its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._wait()

    def kill(self) -> None:
        """Ends the process at once, with its workers, which notice it."""
        self._process.kill()
        self._wait()

    def log(self) -> str:
        """Returns all that it said to its operator."""
        return self._log.read_text("utf-8")

    def client(self, **headers: str) -> httpx2.Client:
        """Returns a client that sends requests to it."""
        return httpx2.Client(base_url=self.address, headers=headers, timeout=MAX_SECONDS)

    @property
    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    def _wait(self) -> int:
        code = self._process.wait(MAX_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


@dataclass(frozen=True)
class ServerEvent:
    """A server-sent event. data: parsed JSON."""

    kind: str
    id: str | None
    data: Any


def read_events(response: httpx2.Response) -> Iterator[ServerEvent]:
    """Yields the events of a stream as they come."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if line and name:
            fields[name] = value
        elif not line and fields:
            yield ServerEvent(fields["event"], fields.get("id"), httpx2.Response(200, text=fields["data"]).json())
            fields = {}


def create_video(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    """Submits a tiny video, but for the fields that are given, and returns the answer."""
    return answer_of(client.post("/v1/videos", json={"prompt": PROMPT, **TINY, **fields}))


def wait_until_finished(client: httpx2.Client, video_id: str, *, seconds: float = 0.02) -> list[dict[str, Any]]:
    """Asks for a video until it is completed or failed, and returns all answers.

    Args:
        seconds: between two of them.
    """
    answers, deadline = [], time.monotonic() + MAX_SECONDS
    while not answers or answers[-1]["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, answers[-1]
        time.sleep(seconds if answers else 0)
        answers.append(answer_of(client.get(f"/v1/videos/{video_id}")))
    return answers


def make_video(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    """Makes a tiny video, but for the fields that are given, and returns it completed."""
    video = wait_until_finished(client, create_video(client, **fields)["id"])[-1]
    assert video["status"] == "completed", video["error"]
    return video


def answer_of(response: httpx2.Response) -> Any:
    """Returns the JSON of an answer that is no error."""
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """Returns the error of an answer that must have a status."""
    assert response.status_code == status, response.text
    (envelope,) = response.json().items()
    assert envelope[0] == "error"
    assert set(envelope[1]) == {"message", "type", "param", "code"}
    return envelope[1]


def frames_of(content: bytes, folder: Path) -> np.ndarray:
    """Returns the frames (F, H, W, 3) of an mp4."""
    path = folder / "content.mp4"
    path.write_bytes(content)
    return read_video(path).frames


def psnr(frames: np.ndarray, expected: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of frames in dB."""
    error = np.mean((frames.astype(np.float64) - expected.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def png(color: str, size: tuple[int, int] = (64, 64)) -> bytes:
    """Returns an image of one colour."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()
