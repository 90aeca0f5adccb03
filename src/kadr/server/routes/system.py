"""Routes of everything but videos: uploads, models, LoRAs, the queue, health and metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from kadr.server import schema
from kadr.server.auth import Client
from kadr.server.errors import ApiError, envelope_responses
from kadr.server.inputs.bodies import check_body, content_type, read_body
from kadr.server.inputs.media_sources import find_source, require_file
from kadr.server.inputs.uploads import StoredUpload
from kadr.server.routes import documents
from kadr.server.routes.models import describe_model, show_model
from kadr.server.routes.video_settings import read_settings
from kadr.server.routes.views import show_queue_state
from kadr.server.state import Sender, ServerState, State, require_admin
from kadr.version import __version__

_ERRORS = envelope_responses(400, 401, 403, 404)
_HEALTH: dict[int | str, dict[str, Any]] = {503: {"model": schema.Health}, **envelope_responses(401, 403)}
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}},
    **envelope_responses(401, 403, 507),
}
_UPLOAD_ERRORS = envelope_responses(400, 401, 403, 408, 413, 415, 429, 507)
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                    "additionalProperties": False,
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
router = APIRouter()


@router.post("/v1/uploads", response_model=schema.Upload, responses=_UPLOAD_ERRORS, openapi_extra=_UPLOAD_BODY)
async def create_upload(request: Request, state: State, client: Sender) -> Any:
    """Takes an image or clip, as the field `file` of a form or as the whole body. Its name is not used."""
    if content_type(request) != "multipart/form-data":
        upload = await state.uploads.receive(client.name, request.stream())
        return await to_thread.run_sync(_show_upload, state, client, upload)
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        if set(parsed.files) != {"file"} or parsed.data:
            raise ApiError(400, "the form must have one field, file, with a file.", code="invalid_body", param="file")
        upload = await parsed.files["file"].keep()
        return await to_thread.run_sync(_show_upload, state, client, upload)


@router.post("/v1/uploads/frame", **documents.FRAME)
async def upload_frame(request: Request, state: State, client: Sender) -> Any:
    """Makes an upload of a frame of a clip or video: a PNG with its exact pixels, upright, to show in another video."""
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        body = check_body(schema.UploadFrame, {**parsed.files, **parsed.data})  # a file is none of its fields
    source = find_source(state, client, body.media, 0)
    if source.frames is None:
        raise ApiError(400, "media is an image. Use it as it is.", code="invalid_media", param="media")
    path = require_file(source.path, body.media)
    with state.uploads.begin(client.name) as incoming:
        await incoming.write(await state.frames.read_png(path, body.frame, client.name))
        return _show_upload(state, client, await incoming.keep())


@router.get("/v1/uploads", response_model=schema.UploadList, responses=envelope_responses(401, 403))
async def list_uploads(state: State, client: Sender) -> Any:
    """Lists uploads that have not expired, newest first."""

    def show_all() -> list[dict[str, Any]]:
        return [_show_upload(state, client, upload) for upload in state.uploads.find_all(client.scope)]

    return {"data": await to_thread.run_sync(show_all)}


@router.delete("/v1/uploads/{upload_id}", response_model=schema.DeletedUpload, responses=_ERRORS)
async def delete_upload(state: State, client: Sender, upload_id: str) -> Any:
    """Deletes an upload. Videos that took it have their own."""
    await to_thread.run_sync(state.uploads.delete, upload_id, client.scope)
    return {"id": upload_id}


@router.get("/v1/models", response_model=schema.ModelList, responses=envelope_responses(401, 403))
async def list_models(state: State) -> Any:
    """Lists the models of the server; the first one is the default."""
    return {
        "data": await to_thread.run_sync(lambda: [show_model(state, name) for name in state.catalogue.model_names()])
    }


@router.get("/v1/models/{name:path}", response_model=schema.DescribedModel, responses=_ERRORS)
async def get_model(state: State, name: str) -> Any:
    """Shows a model: its words, its recipe, and what a request with only a prompt resolves to."""
    found, _ = state.catalogue.find_model(name)
    return await to_thread.run_sync(describe_model, state, found, limiter=state.planning)


@router.get("/v1/loras", response_model=schema.LoraList, responses=envelope_responses(401, 403))
async def list_loras(state: State) -> Any:
    """Lists the LoRAs of the server."""
    return {"data": [{"id": name} for name in await to_thread.run_sync(state.catalogue.lora_names)]}


@router.get("/v1/queue", response_model=schema.QueueState, responses=envelope_responses(401, 403, 507))
async def get_queue(state: State, client: Sender) -> Any:
    """Counts a client's videos by status, and tells whether the queue is paused."""
    return _show_queue(state, client)


@router.post("/v1/queue/pause", response_model=schema.QueueState, responses=envelope_responses(401, 403, 507))
async def pause_queue(state: State, client: Sender) -> Any:
    """Lets no further job begin, until `/v1/queue/resume`, also after a restart. For admins."""
    return await _set_paused(state, client, True)


@router.post("/v1/queue/resume", response_model=schema.QueueState, responses=envelope_responses(401, 403, 507))
async def resume_queue(state: State, client: Sender) -> Any:
    """Lets jobs begin again. For admins."""
    return await _set_paused(state, client, False)


@router.get("/v1/system", response_model=schema.SystemState, responses=envelope_responses(400, 401, 403))
async def get_system(state: State, client: Sender) -> Any:
    """Shows the server as a client sees it: its device, its disk, its bounds, and who the client is."""
    facts = await to_thread.run_sync(state.monitor.read)
    return {
        **asdict(facts),
        "version": __version__,
        "max_queued": _max_queued(state, client),
        "max_upload_bytes": state.uploads.limits.max_bytes,
        "is_admin": client.is_admin,
        "client": client.name or None,
        "needs_token": state.needs_token,
    }


@router.get("/health", response_model=schema.Health, responses=_HEALTH)
async def get_health(state: State) -> Response:
    """Tells whether the server is ready to make videos; if it is not, with the status 503."""
    supervisor = state.queue.supervisor
    problem = supervisor.storage_problem()
    health = schema.Health(
        ready=supervisor.num_ready > 0 and problem is None,
        workers_ready=supervisor.num_ready,
        workers=len(supervisor.slots),
        **show_queue_state(state.queue.store.is_paused, problem),
        version=__version__,
    )
    return JSONResponse(health.model_dump(), 200 if health.ready else 503)


@router.get(
    "/health/alive", response_model=schema.Alive, responses=envelope_responses(403), openapi_extra={"security": []}
)
async def get_alive() -> Any:
    """Answers. Needs no token."""
    return {}


@router.get("/metrics", responses=_METRICS, response_class=Response)
async def get_metrics(state: State, client: Sender) -> Response:
    """Figures for Prometheus. For admins."""
    require_admin(client)
    return Response(state.metrics.write(state.queue), media_type="text/plain; version=0.0.4; charset=utf-8")


def _show_upload(state: ServerState, client: Client, upload: StoredUpload) -> dict[str, Any]:
    facts = asdict(upload)
    times = {"created_at": int(upload.created_at), "expires_at": int(upload.created_at + state.uploads.limits.max_age)}
    settings, missing = read_settings(state, client, upload)
    fields = {key: facts[key] for key in schema.Upload.model_fields if key in facts}
    return {**fields, **times, "settings": settings, "missing": missing}


def _show_queue(state: ServerState, client: Client) -> dict[str, Any]:
    problem = state.queue.supervisor.storage_problem()
    return {**show_queue_state(state.queue.store.is_paused, problem), **state.queue.store.counts(client.scope)}


def _max_queued(state: ServerState, client: Client) -> int:
    """Returns the number of a client's videos that may wait."""
    limits = state.queue.store.limits
    share = limits.max_queued_per_owner if client.max_queued is None else client.max_queued
    return limits.max_queued if share is None else min(share, limits.max_queued)


async def _set_paused(state: ServerState, client: Client, is_paused: bool) -> dict[str, Any]:
    require_admin(client)
    await to_thread.run_sync(state.queue.set_paused, is_paused)
    return _show_queue(state, client)
