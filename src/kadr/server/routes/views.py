"""Jobs as the API shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request

from kadr.jobs.job import COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job
from kadr.jobs.live_job import LiveJob
from kadr.server.auth import Client
from kadr.server.routes.drafts import settings_of
from kadr.server.state import ServerState

LOAD = "load"  # the stage of a video whose model is opened, fetched or loaded
VIDEO, THUMBNAIL, SPRITESHEET = "video", "thumbnail", "spritesheet"
STORAGE_PROBLEM = "the server's disk is full or cannot be read"
MAX_POLL_MS, MIN_POLL_MS = 5000, 500
# Of a video whose description was damaged, beside what its result tells.
_LOST_LABELS: Mapping[str, Any] = {"model": "", "size": "", "frames": 0, "fps": 1.0, "remixed_from": None}


def format_seconds(seconds: float) -> str:
    """Formats a length as "5.04" or "8"."""
    return f"{seconds:.2f}".rstrip("0").rstrip(".")


def content_path(job_id: str) -> str:
    """Returns the path of a video's file."""
    return f"/v1/videos/{job_id}/content"


def base_url(request: Request) -> str:
    """Returns scheme and host that a client used. A proxy before the server says in a header where it was https.

    Whoever sends that header changes the addresses in its own answers, and nothing else.
    """
    is_secure = request.headers.get("x-forwarded-proto") == "https"
    url = request.base_url.replace(scheme="https") if is_secure else request.base_url
    return str(url).rstrip("/")


def show_video(
    state: ServerState, client: Client, job: Job, *, base_url: str, position: int | None = None
) -> dict[str, Any]:
    """Returns a job as a `schema.VideoJob`.

    Args:
        base_url: see `base_url`; for absolute addresses.
        position: in the queue.
    """
    labels, live = (
        {**_LOST_LABELS, **(job.result or {}), **job.labels},
        state.queue.supervisor.live.get(job.id) if job.status == IN_PROGRESS else None,
    )
    result: Mapping[str, Any] = job.result or {}
    notices = result.get("notices", ()) if live is None else live.notices
    return {
        "id": job.id,
        "object": "video",
        "model": labels["model"],
        "status": job.status,
        "progress": _progress(job, live),
        "created_at": int(job.created_at),
        "completed_at": int(job.finished_at) if job.status == COMPLETED and job.finished_at is not None else None,
        "expires_at": _whole(state.queue.retention.expires_at(job)),
        "prompt": job.request.get("prompt", ""),
        "seconds": format_seconds(labels["frames"] / labels["fps"]),
        "size": labels["size"],
        "error": {"code": job.error.code, "message": state.hide_paths(job.error.message)} if job.error else None,
        "remixed_from_video_id": labels["remixed_from"],
        "num_frames": labels["frames"],
        "fps": labels["fps"],
        "seed": job.request.get("seed", 0),
        "seq": job.seq,
        "queue_position": position if job.status == QUEUED else None,
        **_show_live(live),
        "preview_url": _preview_address(state, job, live, base_url),
        "notices": [state.hide_paths(notice) for notice in notices],
        **(_addresses(state, job, base_url) if job.status == COMPLETED else {"url": None, "thumbnail_url": None}),
        "inference_time_s": result.get("inference_seconds"),
        "priority": job.priority,
        "favorite": job.is_favorite,
        "media": [_show_medium(job, number, facts) for number, facts in enumerate(job.labels.get("media", ()))],
        "owner": job.owner if client.is_admin else None,
        "request": settings_of(job),
    }


def show_progress(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `LiveJob.report` as an event has it."""
    left, is_loading = data["seconds_left"], data["is_loading"]
    return {
        "progress": min(99, int(100 * data["fraction"])),
        "stage": LOAD if is_loading else data["stage"],
        "step": None if is_loading else data["step"],
        "steps": None if is_loading else data["of"],
        "eta_seconds": None if left is None else round(left, 1),
    }


def show_queue_state(is_paused: bool, problem: str | None) -> dict[str, Any]:
    """Returns whether the queue is paused, and its problem without the operator's paths and figures."""
    return {"paused": is_paused, "problem": None if problem is None else STORAGE_PROBLEM}


def poll_after_ms(job: Job, live: LiveJob | None) -> int:
    """Returns the milliseconds after which a client that polls may ask again."""
    left = None if live is None else live.seconds_left
    return int(min(MAX_POLL_MS, max(MIN_POLL_MS, 1000 if left is None else 100 * left)))


def _show_medium(job: Job, number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a medium of a job, by the reference that requests use for it."""
    kind = "image" if facts.get("frames") is None else "clip"
    return {
        "id": f"{job.id}/{number}",
        "kind": kind,
        "width": facts["upright_width"],
        "height": facts["upright_height"],
        "frames": facts.get("frames"),
        "fps": facts.get("fps"),
    }


def _show_live(live: LiveJob | None) -> dict[str, Any]:
    if live is None:
        return {"stage": None, "step": None, "steps": None, "eta_seconds": None}
    return {key: value for key, value in show_progress(live.report).items() if key != "progress"}


def _progress(job: Job, live: LiveJob | None) -> int:
    if job.status == COMPLETED:
        return 100
    return 0 if live is None or job.status == FAILED else min(99, int(100 * live.fraction))


def _addresses(state: ServerState, job: Job, base_url: str) -> dict[str, str]:
    path = content_path(job.id)
    return {
        "url": base_url + state.signer.sign(path),
        "thumbnail_url": base_url + state.signer.sign(path, variant=THUMBNAIL),
    }


def _preview_address(state: ServerState, job: Job, live: LiveJob | None, base_url: str) -> str | None:
    if live is None or live.preview is None:
        return None
    return base_url + state.signer.sign(f"/v1/videos/{job.id}/preview")


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
