"""Runs an image's entrypoint where there is no network, makes a video over HTTP, and prints when what came.

deploy/rehearse.py starts it in namespaces of its own: of the network, mounts and processes. The container is as
deploy/compose.yaml makes it: its root is read-only, its user has no capabilities, its volumes are empty at first.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from deploy.chroot import find_user, forget_cached_pages

PROMPT = "a red circle moving right on a black background"
TOKEN = secrets.token_hex(16)
MAX_SECONDS = 120.0
POLL_SECONDS = 0.02
UNPRIVILEGED = ("--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")


class Failure(Exception):
    """Something in the image does not work as deployed."""


def main() -> None:
    """Runs the image twice and prints the seconds of both as JSON; what goes wrong, on stderr."""
    image, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="kadr-volumes-") as volumes:
        mount(image, Path(volumes), settings["volumes"])
        check_refusal(image, settings)
        forget_cached_pages(image)
        runs = [run(image, settings) for _ in range(2)]
    print(json.dumps(runs))


def mount(image: Path, volumes: Path, places: list[str]) -> None:
    """Mounts what a container has: nothing else may be written in it. Volumes begin with what the image has there.

    The mounts end with the namespace.
    """

    def call(*words: str) -> None:
        subprocess.run(["mount", *words], check=True)

    call("--bind", str(image), str(image))
    call("-o", "remount,bind,ro", str(image))
    call("-t", "proc", "proc", f"{image}/proc")
    call("-t", "tmpfs", "-o", "size=64m", "shm", f"{image}/dev/shm")
    call("-t", "tmpfs", "-o", "size=1g", "tmp", f"{image}/tmp")
    for place in places:
        volume = volumes / place.strip("/")
        subprocess.run(["cp", "--archive", f"{image}{place}", str(volume)], check=True)
        call("--bind", str(volume), f"{image}{place}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def container_command(image: Path, settings: dict[str, Any], words: list[str], token: str | None) -> list[str]:
    """Returns a command that runs words in a container of the image, as its user."""
    user, group = find_user(image, settings["user"])
    variables = {**settings["environment"], **({"KADR_TOKEN": token} if token else {})}
    assignments = [f"{name}={value}" for name, value in variables.items()]
    own = ["setpriv", f"--reuid={user}", f"--regid={group}", *UNPRIVILEGED]
    return ["chroot", str(image), *own, "env", "-i", "-C", settings["folder"], *assignments, *words]


def check_refusal(image: Path, settings: dict[str, Any]) -> None:
    """Checks that nobody can start a server that everyone may use."""
    command = container_command(image, settings, settings["entrypoint"], None)
    process = subprocess.run(command, capture_output=True, text=True, timeout=MAX_SECONDS)
    if process.returncode != 1 or "KADR_TOKEN" not in process.stderr:
        raise Failure(f"without a token the container ended with {process.returncode}: {process.stderr}")


def run(image: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Runs a container from its start to its end; returns what came after how many seconds."""
    seconds: dict[str, float] = {}
    with start(image, settings) as process:
        began = time.monotonic()
        wait_until(process, lambda: ask("GET", "/health/alive")[0] == 200)
        seconds["healthy"] = time.monotonic() - began
        body = json.dumps({"prompt": PROMPT, "seed": 7}).encode()
        status, answer = ask("POST", "/v1/videos", body)
        if status != 200:
            raise Failure(f"the video was not accepted: {status} {answer!r}")
        video = json.loads(answer)["id"]
        for kind, data in events(video):
            if kind == "progress" and data["step"]:
                seconds.setdefault("first step", time.monotonic() - began)
            elif kind == "preview":
                seconds.setdefault("first preview", time.monotonic() - began)
            elif kind == "job" and data["status"] in ("completed", "failed"):
                seconds["finished video"] = time.monotonic() - began
                if data["status"] == "failed":
                    raise Failure(f"the video failed: {data['error']}")
        check(image, settings, video)
        ended = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if (code := process.wait(MAX_SECONDS)) != 0:
            raise Failure(f"the container was stopped and ended with {code}")
        seconds["(stopping)"] = time.monotonic() - ended
    return seconds


@contextmanager
def start(image: Path, settings: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the entrypoint, and ends it with the block."""
    command = container_command(image, settings, settings["entrypoint"], TOKEN)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def check(image: Path, settings: dict[str, Any], video: str) -> None:
    """Checks the image's health check, that a request without a token is refused, and the file of the video."""
    command = container_command(image, settings, settings["health_check"], None)
    if (code := subprocess.run(command, timeout=MAX_SECONDS).returncode) != 0:
        raise Failure(f"the health check of a server that answers ended with {code}")
    if (status := ask("GET", "/v1/videos", token="")[0]) != 401:
        raise Failure(f"a request without a token was answered with {status}")
    status, page = ask("GET", "/")
    if status != 200 or b"<html" not in page:
        raise Failure(f"the page was answered with {status}")
    from kadr.media.clip import read_video  # now: it takes the processor's time

    status, data = ask("GET", f"/v1/videos/{video}/content")
    if status != 200:
        raise Failure(f"the video was answered with {status}: {data!r}")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        frames = read_video(file.name).frames
    if len(frames) < 9 or frames.std() < 1:
        raise Failure(f"the video has {len(frames)} frames, or one colour")


def wait_until(process: subprocess.Popen[bytes], is_so: Any) -> None:
    """Waits until a server answers as expected."""
    deadline = time.monotonic() + MAX_SECONDS
    while True:
        try:
            if is_so():
                return
        except OSError:
            pass  # it does not listen yet
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f"the container did not answer within {MAX_SECONDS:.0f} s; exit code {process.poll()}")
        time.sleep(POLL_SECONDS)


def ask(method: str, path: str, body: bytes | None = None, *, token: str = TOKEN) -> tuple[int, bytes]:
    """Returns status and body of an answer."""
    connection = HTTPConnection("127.0.0.1", 8000, timeout=MAX_SECONDS)
    try:
        connection.request(method, path, body, headers(token))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def events(video: str) -> Iterator[tuple[str, Any]]:
    """Yields the events of a video, each with its kind and data, until it is finished."""
    connection = HTTPConnection("127.0.0.1", 8000, timeout=MAX_SECONDS)
    connection.request("GET", f"/v1/videos/{video}/events", None, headers(TOKEN))
    kind = ""
    for line in connection.getresponse():
        name, _, text = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = text
        elif name == "data":
            yield kind, json.loads(text)
    connection.close()


def headers(token: str) -> dict[str, str]:
    """Returns the headers of a request with a token, or without one."""
    return {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"error: {failure}")
