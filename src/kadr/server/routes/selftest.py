"""Routes of the self-test of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request

from kadr.server import schema
from kadr.server.errors import ApiError, envelope_responses
from kadr.server.inputs.bodies import check_body, read_body
from kadr.server.routes.documents import form_body
from kadr.server.state import Sender, State, require_admin

_START_ERRORS = envelope_responses(400, 401, 403, 404, 408, 409, 413, 415, 429, 507)
router = APIRouter()


@router.post(
    "/v1/selftest",
    response_model=schema.SelftestStatus,
    responses=_START_ERRORS,
    openapi_extra=form_body(schema.StartSelftest),
)
async def start_selftest(request: Request, state: State, client: Sender) -> Any:
    """Starts `kadr selftest` of a model, beside the videos that are made; one runs at a time. For admins."""
    require_admin(client)
    async with read_body(request, client, state.uploads, state.body_memory) as parsed:
        if parsed.files:
            raise ApiError(400, "a self-test takes no file.", code="invalid_body")
        body = check_body(schema.StartSelftest, parsed.data)
    name, model = state.catalogue.find_model(body.model)
    return asdict(await to_thread.run_sync(state.selftests.start, name, model))


@router.get("/v1/selftest", response_model=schema.SelftestStatus, responses=envelope_responses(401, 403))
async def get_selftest(state: State, client: Sender) -> Any:
    """Shows the self-test in progress, or else the last one since the server began. For admins."""
    require_admin(client)
    return asdict(state.selftests.state)
