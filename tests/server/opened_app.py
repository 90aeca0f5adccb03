"""An application with its queue, in this process and without workers: a test says what becomes of its jobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kadr.jobs.engine_maker import SPRITESHEET_FILE, THUMBNAIL_FILE, VIDEO_FILE
from kadr.jobs.folders import write_result
from kadr.jobs.job import Job
from kadr.server.app import create_app
from kadr.server.auth import Client, Tokens
from kadr.server.gate import GateRules
from kadr.server.run import ServerSettings, open_state
from kadr.server.state import ServerState
from tests.server.app_client import AppClient

DEMO = "demo"
ADMIN, ANNA, BEN = "the-admins-token-0000", "the-token-of-anna-0000", "the-token-of-ben-0000"
SMALL = {"prompt": "a red circle", "size": "64x64", "num_frames": 9, "num_inference_steps": 1}


def some_tokens() -> Tokens:
    """Returns the tokens of an admin and of two clients, Anna and Ben."""
    single = Tokens.single
    digests = {token: next(iter(single(token).by_digest)) for token in (ADMIN, ANNA, BEN)}
    return Tokens(
        {
            digests[ADMIN]: Client("admin", is_admin=True),
            digests[ANNA]: Client("anna", max_queued=1000),
            digests[BEN]: Client("ben"),
        }
    )


@dataclass
class OpenedApp:
    """An application and its queue.

    Args:
        send: sends a request to it.
        folder: of the server's data.
        lines: of its log.
    """

    send: AppClient
    state: ServerState
    rules: GateRules
    folder: Path
    lines: list[str] = field(default_factory=list)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Checks that the block adds no job and leaves no file or folder."""
        before = self._everything()
        yield
        assert self._everything() == before

    def _everything(self) -> tuple[Any, ...]:
        files = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if not path.name.startswith("jobs.sqlite") and path.name not in ("jobs", "uploads")
        )
        return files, self.state.queue.store.counts()

    def submit(self, token: str | None = None, **settings: Any) -> str:
        """Submits a small video and returns its id."""
        answer = self.send("POST", "/v1/videos", token=token, json_body={**SMALL, **settings})
        assert answer.status == 200, answer
        return answer.data["id"]

    def upload(self, content: bytes, token: str | None = None) -> str:
        """Uploads an image or clip and returns its id."""
        headers = {"content-type": "application/octet-stream"}
        answer = self.send("POST", "/v1/uploads", token=token, body=content, headers=headers)
        assert answer.status == 200, answer
        return answer.data["id"]

    def complete(self, video: bytes = b"a video", **result: Any) -> Job:
        """Makes the next job that waits completed, as a worker would, and returns it."""
        claims = self.state.queue.claims
        claim = claims.claim()
        assert claim is not None
        output = claims.store.folders.attempt(claim.job.id, claim.fence)
        output.mkdir()
        for name, content in ((VIDEO_FILE, video), (THUMBNAIL_FILE, b"a still"), (SPRITESHEET_FILE, b"a sheet")):
            (output / name).write_bytes(content)
        labels = claim.job.labels
        facts = {"size": labels["size"], "frames": labels["frames"], "fps": labels["fps"], "notices": []}
        write_result(output, {**facts, **result})
        claims.complete(claim, {**facts, **result})
        return claims.store.get(claim.job.id)

    def add_completed(self, token: str | None = None, **settings: Any) -> str:
        """Submits a video, completes it ahead of all others, and returns its id."""
        video_id = self.submit(token, priority=100, **settings)
        while self.complete().id != video_id:
            pass
        return video_id


@contextmanager
def open_app(folder: Path, loop: Any, **settings: Any) -> Iterator[OpenedApp]:
    """Opens an application on a queue without workers. settings: of `ServerSettings`."""
    lines: list[str] = []
    rules_changes = settings.pop("rules", {})
    chosen = ServerSettings(**{"models": {DEMO: DEMO}, "folder": folder, **settings})
    with open_state(chosen, lines.append, makers=()) as (state, rules):
        rules = GateRules(**{**vars(rules), **rules_changes})
        send = AppClient(create_app(state, rules), loop, (str(folder),))
        yield OpenedApp(send, state, rules, folder, lines)
