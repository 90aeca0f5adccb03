"""The OpenAPI description of routes that read their bodies by themselves, and of their answers."""

from __future__ import annotations

import copy
from typing import Any

from fastapi.responses import FileResponse, Response
from pydantic import BaseModel

from kadr.server import schema
from kadr.server.errors import envelope_responses


def form_body(model: type[BaseModel], *files: str) -> dict[str, Any]:
    """Returns the description of a body that is JSON, or multipart in which some fields may be files."""
    schema = _inlined(model.model_json_schema())
    form = copy.deepcopy(schema)
    for name in files:
        file = {"type": "string", "format": "binary"}
        form["properties"][name] = {"anyOf": [file, *form["properties"][name].get("anyOf", [form["properties"][name]])]}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema without references: what they lead to stands in their place."""
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return inline(definitions[part["$ref"].rpartition("/")[2]])
            return {key: inline(value) for key, value in part.items()}
        return [inline(item) for item in part] if isinstance(part, list) else part

    inlined: dict[str, Any] = inline(schema)
    return inlined


ERRORS = envelope_responses(400, 401, 403, 404, 507)
_BODY_ERRORS = envelope_responses(400, 401, 403, 404, 408, 409, 413, 415, 429, 503, 507)
_MP4: dict[str, Any] = {"content": {"video/mp4": {}}}
_FILE: dict[str, Any] = {"content": {"video/mp4": {}, "image/jpeg": {}}}


def _creates(body: type[BaseModel], *files: str) -> dict[str, Any]:
    """Returns the arguments of a route that takes a body and answers with a video."""
    return {"response_model": schema.VideoJob, "responses": _BODY_ERRORS, "openapi_extra": form_body(body, *files)}


CREATE = _creates(schema.CreateVideo, "input_reference")
EDIT = _creates(schema.EditVideo, "video", "input_reference")
EXTEND = _creates(schema.ExtendVideo, "video", "input_reference")
REMIX = _creates(schema.RemixVideo)
MOVE = _creates(schema.MoveVideo)
FAVORITE = _creates(schema.FavoriteVideo)
PLAN = {**CREATE, "response_model": schema.VideoPlan}
FRAME: dict[str, Any] = {
    "response_model": schema.Upload,
    "responses": _BODY_ERRORS,
    "openapi_extra": form_body(schema.UploadFrame),
}
CANCEL: dict[str, Any] = {"response_model": schema.VideoJob, "responses": {**ERRORS, **envelope_responses(409)}}
SYNC: dict[str, Any] = {
    "response_class": FileResponse,
    "responses": {200: _MP4, **_BODY_ERRORS, **envelope_responses(422)},
    "openapi_extra": CREATE["openapi_extra"],
}
PREVIEW_FILE: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"content": {"image/webp": {}}}, **ERRORS},
}
SMALL_IMAGE: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"content": {"image/jpeg": {}}}, 304: {"description": "The client has it."}, **ERRORS},
}
CONTENT: dict[str, Any] = {
    "response_class": FileResponse,
    "responses": {200: _FILE, 206: _FILE, **ERRORS, **envelope_responses(416)},
}
