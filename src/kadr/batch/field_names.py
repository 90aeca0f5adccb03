"""Names of the fields of a row: those of a `Request`, and what only a row has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.request.request import Request
from kadr.schema import REQUEST
from kadr.validation import near_names

REQUEST_FIELDS = tuple(field.name for field in fields(Request))
ROW_FIELDS = ("model", "lora", "loras", "image", "video", "control", "seconds", "width", "height", "output")
FIELDS = (*REQUEST_FIELDS, *ROW_FIELDS, REQUEST.key)
# In a cell of a .csv, which is JSON otherwise.
TEXT_FIELDS = ("prompt", "negative_prompt", "original_prompt", "size", "sampler", "input_video", "model", "output")
STRUCTURE_OR_TEXT_FIELDS = ("image", "video", "control", "lora")


def refuse_unknown_fields(names: Iterable[str]) -> None:
    """Refuses names that are no fields of a row.

    Raises:
        RequestError: names the first one, and the field with the most similar name.
    """
    unknown = next((name for name in names if name not in FIELDS), None)
    if unknown is None:
        return
    near = near_names(unknown, FIELDS, count=1)
    way_out = f"Did you mean {near[0]}?" if near else "docs/guides/batch.md lists the fields."
    raise RequestError(f"there is no field {quote(unknown)}. {way_out}")
