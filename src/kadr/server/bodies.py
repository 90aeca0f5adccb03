"""Reads bodies: JSON, or multipart with files, into one form; and checks it against a model of `schema`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from kadr.json_reader import parse_json
from kadr.quoting import quote, show
from kadr.server.errors import ApiError, validation_error

MAX_FIELDS, MAX_FILES = 256, 8
MAX_FIELD_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20  # data: URLs of images are in it
MAX_NESTED_KEYS = 4
_KEY = re.compile(r"\[([^\[\]]*)\]")
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
    """Returns the fields of a form; a[b] is b of the object a, a[] another entry of the list a, as clients write them.

    The values are text: what reads as JSON, such as a number, an object or true, is that, for fields that can be it.
    """
    body = ParsedBody({})
    for name, value in items:
        if isinstance(value, UploadFile):
            if name in body.files or name in body.data:
                raise _double(name)
            body.files[name] = value
        else:
            _put(body.data, name, value)
    return body


def _put(data: dict[str, Any], name: str, text: str) -> None:
    root, _, rest = name.partition("[")
    keys = _KEY.findall(f"[{rest}") if rest else []
    if len(keys) > MAX_NESTED_KEYS or (rest and "".join(f"[{key}]" for key in keys) != f"[{rest}"):
        raise ApiError(400, f"{quote(name)} is not the name of a field.", code="invalid_body", param=show(name))
    path = [root, *keys]
    place: Any = data
    for key, following in pairwise(path):
        place = _step_into(place, key, [] if following == "" else {}, name)
    if isinstance(place, list):
        place.append(_value(root, text))
    elif path[-1] in place:
        raise _double(name)
    else:
        place[path[-1]] = _value(root, text)


def _step_into(place: Any, key: str, empty: Any, name: str) -> Any:
    if isinstance(place, list):
        place.append(empty)
        return place[-1]
    inner = place.setdefault(key, empty)
    if type(inner) is not type(empty):
        raise _double(name)
    return inner


# Fields that are text whatever stands in them: a prompt may read "42" or "true".
_TEXT_FIELDS = ("prompt", "negative_prompt", "model", "size", "seconds", "sampler", "input_video", "video", "before")


def _value(root: str, text: str) -> Any:
    if root in _TEXT_FIELDS:
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text


def _double(name: str) -> ApiError:
    return ApiError(400, f"{quote(name)} is given twice.", code="invalid_body", param=show(name))
