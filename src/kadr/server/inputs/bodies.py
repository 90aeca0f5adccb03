"""Reads bodies: JSON, or a form with files, into one shape; and checks it against a model of `schema`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel, ValidationError

from kadr.json_reader import parse_json
from kadr.quoting import quote, show
from kadr.server.auth import Client
from kadr.server.errors import ApiError, validation_error
from kadr.server.inputs.body_memory import BodyMemory
from kadr.server.inputs.form_reader import Form, FormReader, read_urlencoded
from kadr.server.inputs.forms import double_field, parse_fields
from kadr.server.inputs.uploads import IncomingUpload, UploadStore

MAX_JSON_BYTES = 64 << 20  # data: URLs of images are in it
MAX_JSON_VALUES = 200_000  # an empty list of two bytes takes 56 in memory
_PARSED_HERE_BYTES = 1 << 16  # a larger text is parsed in a thread, so that others need not wait

Body = TypeVar("Body", bound=BaseModel)


@dataclass
class ParsedBody:
    """A body as plain data, with its files by field. hold: keeps another file of the request while the block runs."""

    data: dict[str, Any]
    hold: Callable[[IncomingUpload], IncomingUpload]
    files: dict[str, IncomingUpload] = field(default_factory=dict)


@asynccontextmanager
async def read_body(
    request: Request, client: Client, uploads: UploadStore, memory: BodyMemory
) -> AsyncIterator[ParsedBody]:
    """Reads a body of either form; its files are there while the block runs, and then removed unless they are kept.

    Raises:
        ApiError: it is too large, damaged, or of another type.
    """
    kind = content_type(request)
    with memory.share(client.name) as count_bytes, ExitStack() as stack:
        body = ParsedBody({}, hold=stack.enter_context)
        if kind == "application/json":
            body.data = await _read_json(request, count_bytes)
        elif kind == "multipart/form-data":
            reader = FormReader(
                request.headers["content-type"], lambda: body.hold(uploads.begin(client.name)), count_bytes
            )
            _put_form(body, await reader.read(request.stream()))
        elif kind == "application/x-www-form-urlencoded":
            _put_form(body, Form(await read_urlencoded(request.stream())))
        else:
            raise ApiError(
                415,
                f"the body is of the type {quote(kind or None)}; send application/json or multipart/form-data.",
                code="unsupported_type",
            )
        yield body


def content_type(request: Request) -> str:
    """Returns the type of a body, in small letters and without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_body(model: type[Body], data: Mapping[str, Any]) -> Body:
    """Returns a body as an object of its model.

    Raises:
        ApiError: a field is unknown, missing, or of the wrong type.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error) from error


async def _read_json(request: Request, count_bytes: Callable[[int], object]) -> dict[str, Any]:
    chunks, num_bytes = [], 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_JSON_BYTES:
            raise ApiError(413, f"JSON of more than {MAX_JSON_BYTES:,} bytes: upload the media.", code="too_large",
                           headers={"connection": "close"})  # fmt: skip
        count_bytes(len(chunk))
        chunks.append(chunk)
    text = b"".join(chunks)
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ApiError(413, f"JSON of more than {MAX_JSON_VALUES:,} values.", code="too_large")
    try:
        data = await _parse(text)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {show(error)}.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is {quote(data)}; it must be an object.", code="invalid_body")
    return data


async def _parse(text: bytes) -> Any:
    if len(text) <= _PARSED_HERE_BYTES:
        return parse_json(text, is_strict=True)
    return await to_thread.run_sync(lambda: parse_json(text, is_strict=True))


def _put_form(body: ParsedBody, form: Form) -> None:
    """Puts the parts of a form into a body."""
    body.data = parse_fields(form.fields)
    for name, file in form.files:
        if name in body.files or name in body.data:
            raise double_field(name)
        assert isinstance(file, IncomingUpload)
        body.files[name] = file
