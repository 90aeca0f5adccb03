"""Reads bodies: JSON, or multipart with files, into one form; and checks it against a model of `schema`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from kadr.json_reader import parse_json
from kadr.quoting import quote, show
from kadr.server.errors import ApiError, validation_error
from kadr.server.forms import double_field, parse_fields

MAX_FIELDS, MAX_FILES = 256, 8
MAX_FIELD_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20  # data: URLs of images are in it
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")

Body = TypeVar("Body", bound=BaseModel)


@dataclass
class ParsedBody:
    """A body as plain data, with its files by field."""

    data: dict[str, Any]
    files: dict[str, UploadFile] = field(default_factory=dict)


@asynccontextmanager
async def read_body(request: Request) -> AsyncIterator[ParsedBody]:
    """Reads a body of either form; its files are there while the block runs.

    Raises:
        ApiError: it is too large, damaged, or of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield ParsedBody(await _read_json(request))
    elif kind in _FORM_TYPES:
        try:
            form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
        except HTTPException as error:
            raise ApiError(400, f"the form cannot be read: {error.detail}", code="invalid_body") from error
        try:
            yield _parse_form(form.multi_items())
        finally:
            await form.close()
    else:
        raise ApiError(
            415,
            f"the body is of the type {quote(kind or None)}; send application/json or multipart/form-data.",
            code="unsupported_type",
        )


def check_body(model: type[Body], data: Mapping[str, Any]) -> Body:
    """Returns a body as an object of its model.

    Raises:
        ApiError: a field is unknown, missing, or of the wrong type.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error) from error


async def _read_json(request: Request) -> dict[str, Any]:
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > MAX_JSON_BYTES:
            raise ApiError(413, f"JSON of more than {MAX_JSON_BYTES:,} bytes: upload the media.", code="too_large")
    try:
        data = parse_json(b"".join(chunks))
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {show(error)}.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is {quote(data)}; it must be an object.", code="invalid_body")
    return data


def _parse_form(items: list[tuple[str, UploadFile | str]]) -> ParsedBody:
    """Returns the fields of a form, and its files."""
    files: dict[str, UploadFile] = {}
    fields: list[tuple[str, str]] = []
    for name, value in items:
        if not isinstance(value, UploadFile):
            fields.append((name, value))
        elif name in files:
            raise double_field(name)
        else:
            files[name] = value
    body = ParsedBody(parse_fields(fields), files)
    if twice := sorted(set(body.data) & set(files)):
        raise double_field(twice[0])
    return body
