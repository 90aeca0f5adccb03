"""Errors of the server's own: what it cannot store, find or explain, in the same envelope and without a path."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import pytest

from kadr.errors import Cancelled, CheckpointError, PlanError
from kadr.hidden_paths import PathHider
from kadr.jobs.folders import JobFolders
from kadr.jobs.job import StorageError
from kadr.server.catalogue import Catalogue
from kadr.server.errors import ApiError
from tests.server.answers import MARKER, Answer, check_envelope, refused
from tests.server.media import image
from tests.server.opened_app import ADMIN, ANNA, SMALL, OpenedApp
from tests.server.raw_http import head, read_all, serve_app


class DiskUsage(NamedTuple):
    """A disk that is full, as `shutil.disk_usage` shows it."""

    total: int = 10**12
    used: int = 10**12
    free: int = 0


def test_full_disk_is_said(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage())
    with app.unchanged():
        refused(app.send("POST", "/v1/uploads", token=ANNA, body=image()), 507, "storage_unavailable")
    assert app.send("GET", "/v1/queue", token=ANNA).data["problem"] == "the server's disk is full or cannot be read"
    assert app.send("GET", "/health", token=ANNA).status == 503


def test_folder_that_cannot_be_written_is_said(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folders: JobFolders, job_id: str, submitted: Any) -> None:
        raise StorageError(f"{folders.root} cannot be written")

    monkeypatch.setattr(JobFolders, "create", refuse)
    app.lines.clear()
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body=SMALL), 507, "storage_unavailable")
    assert MARKER in app.lines[0]  # the operator is told where


def test_file_that_is_gone_is_said(app: OpenedApp) -> None:
    video_id = app.add_completed(ANNA)
    (app.state.queue.store.folders.output(video_id) / "video.mp4").unlink()
    answer = app.send("GET", f"/v1/videos/{video_id}/content", token=ANNA)
    refused(answer, 404, "content_not_found")
    assert app.send("GET", f"/v1/videos/{video_id}/content?variant=thumbnail", token=ANNA).status == 200


@pytest.mark.parametrize(
    "error, status, code",
    [
        (CheckpointError(f"/srv/{MARKER}/model.safetensors is damaged"), 503, "model_unavailable"),
        (PlanError(f"/srv/{MARKER}/model.safetensors needs 90 GB", shortfall=1), 400, "does_not_fit"),
        (Cancelled("the server stops"), 503, "stopping"),
        (ApiError(429, "too many", code="queue_full", headers={"retry-after": "7"}), 429, "queue_full"),
    ],
)
def test_errors_of_a_model_are_in_the_envelope(
    app: OpenedApp, error: Exception, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(catalogue: Catalogue, options: Any) -> None:
        raise error

    monkeypatch.setattr(Catalogue, "engine", fail)
    monkeypatch.setattr(app.state.hide_paths, "_known", PathHider([f"/srv/{MARKER}"])._known)
    with app.unchanged():
        for path in ("/v1/videos", "/v1/plan"):
            refused(app.send("POST", path, token=ANNA, json_body=SMALL), status, code)


def test_bug_is_not_shown_to_clients(
    local_app: OpenedApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError(f"a secret of {MARKER}")

    monkeypatch.setattr(Catalogue, "model_names", fail)
    events = local_app.state.queue.events
    with serve_app(local_app.send.app, events) as server, server.connect() as connection:
        connection.sendall(head("GET", "/v1/models", "Connection: close"))
        content = read_all(connection)
    start, _, body = content.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 500")
    answer = Answer(500, [("content-type", "application/json")], body)
    check_envelope(answer)
    assert answer.code == "internal"
    assert b"secret" not in content
    assert MARKER in caplog.text  # it is in the log


def test_counts_of_answers_have_bounded_names(app: OpenedApp) -> None:
    for path in ("/a", "/b/c", "/v1/videos/x", "/v1/videos/y"):
        app.send("GET", path, token=ANNA)
    figures = app.send("GET", "/metrics", token=ADMIN).body.decode()
    assert 'route="/v1/videos/{video_id}",status="404"' in figures
    assert 'route="unknown",status="404"' in figures
    assert "/b/c" not in figures
