"""Routes of videos: create, show, list, cancel, move, delete, remix, edit, extend, plan."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from kadr.errors import KadrWarning, MediaError
from kadr.jobs.job import QUEUED, Job, JobConflictError, is_job_id
from kadr.media.encoders.formats import CODECS, MP4, check_size
from kadr.media.known_headers import use_known_headers
from kadr.quoting import show
from kadr.request.request import MAX_FPS
from kadr.request.resolved_request import ResolvedRequest
from kadr.server import schema
from kadr.server.auth import Client
from kadr.server.errors import ApiError
from kadr.server.inputs.bodies import ParsedBody, check_body, read_body
from kadr.server.inputs.media_sources import MediaSource, copy_sources, find_source, reference_id
from kadr.server.routes import documents
from kadr.server.routes.content import answer_with_file
from kadr.server.routes.drafts import Draft, build_draft, parse_seconds, remix_draft
from kadr.server.routes.plans import show_plan
from kadr.server.routes.views import VIDEO, base_url, poll_after_ms, show_video
from kadr.server.state import Sender, ServerState, State
from kadr.shapes import MAX_FRAMES
from kadr.validation import check_range

MAX_KEY_CHARACTERS = 255
MAX_QUERY_CHARACTERS = 500
SYNC_POLL_SECONDS = 0.25
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", max_length=MAX_KEY_CHARACTERS)]
router = APIRouter(prefix="/v1")


@router.post("/videos", **documents.CREATE)
async def create_video(
    request: Request, state: State, client: Sender, idempotency_key: IdempotencyKey = None
) -> Response:
    """Accepts a request for a video. When it is answered, the job is on disk."""
    async with _read_draft(request, state, client) as (draft, resolved):
        job = await _submit(state, client, draft, resolved, idempotency_key)
    return _answer(request, state, client, job)


@router.post("/videos/sync", **documents.SYNC)
async def create_video_and_wait(request: Request, state: State, client: Sender) -> Response:
    """Makes a video and answers with its file. A client that goes away cancels it."""
    async with _read_draft(request, state, client) as (draft, resolved):
        job = await _submit(state, client, draft, resolved, None)
    while not (job := state.queue.store.get(job.id)).is_finished:
        if await request.is_disconnected():
            _cancel_quietly(state, job.id)
        await asyncio.sleep(SYNC_POLL_SECONDS)
    if job.error is not None:
        raise ApiError(422, state.hide_paths(job.error.message), code=job.error.code)
    response = answer_with_file(state, job.id, VIDEO)
    response.headers["x-video-id"] = job.id
    return response


@router.post("/videos/edits", **documents.EDIT)
async def edit_video(
    request: Request, state: State, client: Sender, idempotency_key: IdempotencyKey = None
) -> Response:
    """Makes a video from another one: its motion stays, by `denoise_strength`."""

    def settings(body: schema.EditVideo, source: MediaSource, reference: str) -> dict[str, Any]:
        _refuse_fields(body, "an edit, which starts from video", "input_video")
        has_length = any(length is not None for length in (body.seconds, body.frames, body.num_frames))
        length = {} if has_length else {"frames": source.frames}
        return {"input_video": reference, **_shape_of(body, source), **length}

    return await _from_video(request, state, client, idempotency_key, schema.EditVideo, settings)


@router.post("/videos/extensions", **documents.EXTEND)
async def extend_video(
    request: Request, state: State, client: Sender, idempotency_key: IdempotencyKey = None
) -> Response:
    """Makes a video that begins with another one and goes on; its length is that of both."""

    def settings(body: schema.ExtendVideo, source: MediaSource, reference: str) -> dict[str, Any]:
        _refuse_fields(body, "an extension, whose seconds are the length to add", "frames", "num_frames")
        shape = _shape_of(body, source)
        check_range("fps", shape["fps"], 0.1, MAX_FPS)
        if body.seconds is None:
            raise ApiError(400, "seconds is missing: the length to add.", code="missing_value", param="seconds")
        added = max(1, round(min(parse_seconds(body.seconds) * shape["fps"], MAX_FRAMES)))
        conditions = [{"media": reference}, *(body.conditions or ())]
        return {**shape, "frames": (source.frames or 1) + added, "conditions": conditions, "seconds": None}

    return await _from_video(request, state, client, idempotency_key, schema.ExtendVideo, settings)


@router.get("/videos", response_model=schema.VideoList, responses=documents.ERRORS)
async def list_videos(
    request: Request,
    state: State,
    client: Sender,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    status: Literal["queued", "in_progress", "completed", "failed"] | None = None,
    query: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS, description="Words that the prompt has.")] = "",
    favorite: Annotated[bool | None, Query(description="true: favourites only.")] = None,
) -> Any:
    """Lists videos in the order of their submission, by pages: `after` is the last id of the page before."""
    statuses = () if status is None else (status,)
    find = partial(state.queue.store.jobs, client.scope, statuses=statuses, after=after, limit=limit)
    try:
        page = find(newest_first=order == "desc", words=query.split(), is_favorite=favorite)
    except ValueError as error:  # RequestError: of `after`, as the limit is checked
        raise ApiError(400, str(error), code="invalid_value", param="after") from error
    data = _show_all(request, state, client, page.jobs)
    ids = [video["id"] for video in data]
    return {"data": data, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
            "has_more": page.has_more}  # fmt: skip


@router.get("/videos/{video_id}", response_model=schema.VideoJob, responses=documents.ERRORS)
async def get_video(request: Request, state: State, client: Sender, video_id: str) -> Response:
    """Shows a video."""
    return _answer(request, state, client, state.queue.store.get(video_id, client.scope))


@router.delete("/videos/{video_id}", response_model=schema.DeletedVideo, responses=documents.ERRORS)
async def delete_video(state: State, client: Sender, video_id: str) -> Any:
    """Deletes a video with its files. One that is in progress is cancelled first."""
    await to_thread.run_sync(state.queue.store.delete, video_id, client.scope)
    return {"id": video_id}


@router.post("/videos/{video_id}/cancel", **documents.CANCEL)
async def cancel_video(request: Request, state: State, client: Sender, video_id: str) -> Response:
    """Cancels a video that waits or is in progress; it is then failed, with the code "cancelled"."""
    job = await to_thread.run_sync(state.queue.store.cancel, video_id, client.scope)
    return _answer(request, state, client, job)


@router.post("/videos/{video_id}/favorite", **documents.FAVORITE)
async def set_favorite(request: Request, state: State, client: Sender, video_id: str) -> Response:
    """Makes a video a favourite, which never expires, or no longer one."""
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        _refuse_files(parsed)
        is_favorite = check_body(schema.FavoriteVideo, parsed.data).favorite
    job = await to_thread.run_sync(state.queue.store.set_favorite, video_id, is_favorite, client.scope)
    return _answer(request, state, client, job)


@router.post("/videos/{video_id}/move", **documents.MOVE)
async def move_video(request: Request, state: State, client: Sender, video_id: str) -> Response:
    """Moves a video that waits to just before another one, or to the end of the queue."""
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        _refuse_files(parsed)
        before = check_body(schema.MoveVideo, parsed.data).before
    move = state.queue.store.move
    job = await to_thread.run_sync(lambda: move(video_id, before=before, owner=client.scope))
    return _answer(request, state, client, job)


@router.post("/videos/{video_id}/remix", **documents.REMIX)
async def remix_video(
    request: Request, state: State, client: Sender, video_id: str, idempotency_key: IdempotencyKey = None
) -> Response:
    """Makes a video again with another prompt: same seed, same settings."""
    job = state.queue.store.get(video_id, client.scope)
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        _refuse_files(parsed)
        prompt = check_body(schema.RemixVideo, parsed.data).prompt
    draft = remix_draft(state, client, job, prompt)
    resolved = await _resolve(state, draft)
    return _answer(request, state, client, await _submit(state, client, draft, resolved, idempotency_key))


@router.post("/plan", **documents.PLAN)
async def plan_video(request: Request, state: State, client: Sender) -> Any:
    """Tells what a video would take: memory, time, bytes to fetch; and what would fit. Makes nothing."""
    async with _read_draft(request, state, client) as (draft, resolved):
        return await to_thread.run_sync(show_plan, state, draft, resolved, limiter=state.planning)


@asynccontextmanager
async def _read_draft(
    request: Request, state: ServerState, client: Client
) -> AsyncIterator[tuple[Draft, ResolvedRequest]]:
    """Reads the body of a new video, and resolves it for its model; files that come with it are there in the block."""
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        _refuse_files(parsed, "input_reference")
        body = check_body(schema.CreateVideo, _with_extra(parsed.data))
        begin = await reference_id(state, client, parsed, "input_reference", body.input_reference)
        draft = await _build(state, client, body, begin)
        yield draft, await _resolve(state, draft)


async def _from_video(
    request: Request,
    state: ServerState,
    client: Client,
    idempotency_key: str | None,
    model: type[Any],
    settings: Callable[[Any, MediaSource, str], dict[str, Any]],
) -> Response:
    """Submits a job that is made from another video, which is a file of the form or an id."""
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        _refuse_files(parsed, "input_reference", "video")
        body = check_body(model, _with_extra(parsed.data))
        reference = await reference_id(state, client, parsed, "video", body.video)
        begin = await reference_id(state, client, parsed, "input_reference", body.input_reference)
        if reference is None:
            raise ApiError(400, "video is missing: a file, or the id of a video.", code="missing_value", param="video")
        source = find_source(state, client, reference, 0)
        if source.frames is None:
            raise ApiError(400, "video is an image; it must be a clip.", code="invalid_media", param="video")
        body = body.model_copy(update=settings(body, source, reference))
        draft = await _build(state, client, body, begin)
        draft = replace(draft, remixed_from=reference if is_job_id(reference) else None)
        job = await _submit(state, client, draft, await _resolve(state, draft), idempotency_key)
    return _answer(request, state, client, job)


def _refuse_files(parsed: ParsedBody, *names: str) -> None:
    """Refuses files other than those of these fields."""
    if unknown := sorted(set(parsed.files) - set(names)):
        name = show(unknown[0])
        raise ApiError(400, f"{name} is not a file of this request.", code="unknown_parameter", param=name)


def _shape_of(body: schema.VideoSettings, source: MediaSource) -> dict[str, Any]:
    """Returns size and frame rate: as asked, or those of the video."""
    is_sized = body.size is not None or body.width is not None
    return {"size": body.size if is_sized else f"{source.width}x{source.height}", "fps": body.fps or source.fps}


def _refuse_fields(body: schema.VideoSettings, request: str, *names: str) -> None:
    """Refuses fields that mean nothing in a request."""
    for name in names:
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name} is not for {request}. Leave it out.", code="invalid_value", param=name)


def _with_extra(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a body with the fields of `extra_params` among the others."""
    extra = data.get("extra_params")
    if not isinstance(extra, Mapping):
        return dict(data)  # its check refuses what is not an object
    if twice := sorted(set(extra) & set(data)):
        name = show(twice[0])
        raise ApiError(400, f"{name} is given twice.", code="invalid_value", param=name)
    return {**{key: value for key, value in data.items() if key != "extra_params"}, **extra}


async def _build(state: ServerState, client: Client, body: schema.CreateVideo, begin: str | None) -> Draft:
    return await to_thread.run_sync(build_draft, state, client, body, body.prompt, begin, limiter=state.planning)


async def _resolve(state: ServerState, draft: Draft) -> ResolvedRequest:
    """Resolves a draft for its model: what would fail later is refused now."""

    def resolve() -> ResolvedRequest:
        with warnings.catch_warnings(), use_known_headers(draft.headers):
            warnings.simplefilter("ignore", KadrWarning)
            resolved = state.catalogue.engine(draft.engine).resolve(draft.request)
        try:
            check_size(MP4, CODECS[MP4.codecs[0]], resolved.size)
        except MediaError as error:
            raise ApiError(400, str(error), code="invalid_value", param="size") from error
        return resolved

    return await to_thread.run_sync(resolve, limiter=state.planning)


async def _submit(
    state: ServerState, client: Client, draft: Draft, resolved: ResolvedRequest, idempotency_key: str | None
) -> Job:
    store = state.queue.store
    job = await to_thread.run_sync(
        lambda: store.submit(
            draft.new_job(client, resolved),
            idempotency_key=idempotency_key,
            fill=lambda folder: copy_sources(list(draft.sources), folder),
            max_queued=client.max_queued,
        )
    )
    prompt = "" if state.hides_prompts else f": {job.request['prompt'][:200]!r}"
    state.log(f"{job.id} of {client.name or 'the local user'} is accepted{prompt}")
    return job


def _answer(request: Request, state: ServerState, client: Client, job: Job) -> Response:
    """Returns the answer with a job."""
    (video,) = _show_all(request, state, client, [job])
    headers = {}
    if not job.is_finished:
        headers["openai-poll-after-ms"] = str(poll_after_ms(job, state.queue.supervisor.live.get(job.id)))
    return JSONResponse(video, headers=headers)


def _show_all(request: Request, state: ServerState, client: Client, jobs: Any) -> list[dict[str, Any]]:
    positions: dict[str, int] = {}
    if any(job.status == QUEUED for job in jobs):
        positions = state.queue.store.positions()
    return [show_video(state, client, job, base_url=base_url(request), position=positions.get(job.id)) for job in jobs]


def _cancel_quietly(state: ServerState, job_id: str) -> None:
    """Cancels a job whose client has gone, unless it is finished by now."""
    try:
        state.queue.store.cancel(job_id)
    except JobConflictError:
        return
