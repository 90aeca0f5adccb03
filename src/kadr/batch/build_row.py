"""Builds the rows of a batch: the fields of each over the defaults of all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kadr.batch.field_names import REQUEST_FIELDS, refuse_unknown_fields
from kadr.batch.outcome import RowOutcome, invalid_row
from kadr.batch.output_names import check_output_name, fold_name
from kadr.batch.row import BatchRow, key_rows
from kadr.batch.table_file import TableRow, read_table
from kadr.errors import RequestError
from kadr.jobs.engine_maker import with_media_in
from kadr.jobs.job import is_utf8
from kadr.quoting import quote
from kadr.request.request import Request
from kadr.schema import REQUEST
from kadr.spec.lora import Lora
from kadr.validation import check_fields, check_path, expand_home, is_number

# A row that names one of the left has nothing of the right from the defaults.
_INSTEAD = {
    "sigmas": ("steps", "skip_initial", "skip_final"),
    "steps": ("sigmas",),
    "skip_initial": ("sigmas",),
    "skip_final": ("sigmas",),
    "seconds": ("frames",),
}
_OF_ONE_MODEL = ("release", "vae", "second_model")  # arguments of `Engine.open` that suit one model alone
_TEXTS = ("prompt", "negative_prompt", "original_prompt")


@dataclass(frozen=True)
class RowDefaults:
    """Settings of all rows that do not say otherwise.

    Args:
        request: its prompt does not count.
        engine: arguments of `Engine.open` that tell the model, but for LoRAs; as JSON can hold it.
        loras: of the model.
        seconds: length instead of the frames of the request.
        has_recipe: the model has another recipe than its own, which is no default for other models.
    """

    request: Request = field(default_factory=lambda: Request(""))
    engine: Mapping[str, Any] = field(default_factory=lambda: {"model": "demo"})
    loras: Sequence[Lora] = ()
    seconds: float | None = None
    has_recipe: bool = False


def read_rows(path: Path, defaults: RowDefaults) -> tuple[list[BatchRow], list[RowOutcome]]:
    """Reads the file of a batch.

    Args:
        path: absolute.

    Returns:
        The rows that can be made as they are written, with their keys; and the outcomes of those that cannot.

    Raises:
        RequestError: the file cannot be read; see `read_table`.
    """
    rows: list[BatchRow] = []
    invalid: list[RowOutcome] = []
    lines: dict[str, int] = {}  # by the name of the output
    for table_row in read_table(path):
        try:
            row = build_row(table_row, defaults, path.parent)
            if row.output is not None and lines.setdefault(fold_name(row.output), row.line) != row.line:
                line = lines[fold_name(row.output)]
                raise RequestError(f"output is {quote(row.output)}, as in line {line}. Choose another.")
        except RequestError as error:
            invalid.append(invalid_row(table_row.number, table_row.line, error))
        else:
            rows.append(row)
    return key_rows(rows, path.parent), invalid


def build_row(table_row: TableRow, defaults: RowDefaults, folder: Path) -> BatchRow:
    """Builds a row.

    Args:
        folder: of the batch's file, to which paths in it are relative.

    Raises:
        RequestError: a field is unknown, its value is out of its range, or two contradict each other.
    """
    if table_row.problem:
        raise RequestError(f"{table_row.problem}.")
    fields = REQUEST.upgrade(table_row.fields)
    refuse_unknown_fields(fields)
    _refuse_bad_text(fields)
    if "prompt" not in fields:
        raise RequestError("it has no prompt. Say what to show.")
    loras = _loras(fields, folder) if "lora" in fields or "loras" in fields else list(defaults.loras)
    request_data = {**_defaults_for(fields, defaults), **_request_fields(fields)}
    engine = _engine(fields, defaults, folder)
    if loras and engine.get("merge_loras"):
        engine["loras"] = [[lora.path, *lora.pass_strengths()] for lora in loras]
    elif loras:
        engine["loras"] = [lora.path for lora in loras]
        request_data.setdefault("lora_strengths", [lora.pass_strengths() for lora in loras])
    return BatchRow(
        number=table_row.number,
        line=table_row.line,
        request=with_media_in(Request.from_json(request_data), folder),
        engine=engine,
        seconds=_seconds(fields, defaults),
        output=None if "output" not in fields else check_output_name(fields["output"]),
    )


def _refuse_bad_text(fields: Mapping[str, Any]) -> None:
    """Refuses prompts with characters that no text has.

    Raises:
        RequestError: names the field.
    """
    for name in _TEXTS:
        text = fields.get(name, "")
        if isinstance(text, str) and ("\0" in text or not is_utf8(text)):
            raise RequestError(f"{name} is {quote(text)}; text has no NUL and no half of a character in it.")


def _defaults_for(fields: Mapping[str, Any], defaults: RowDefaults) -> dict[str, Any]:
    """Returns the fields of the default request that hold for a row with these fields."""
    data = {name: value for name, value in defaults.request.to_json().items() if value is not None}
    for name in fields:
        for other in _INSTEAD.get(name, ()):
            data.pop(other, None)
    return data


def _request_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row that its request has, short forms written out."""
    data = {name: value for name, value in fields.items() if name in REQUEST_FIELDS or name == REQUEST.key}
    conditions = [
        *_items("conditions", fields),
        *_items("image", fields),
        *({"is_clip": True, **item} for item in _items("video", fields)),
    ]
    controls = [*_items("controls", fields), *_items("control", fields)]
    if {"conditions", "image", "video"} & fields.keys():
        data["conditions"] = conditions
    if {"controls", "control"} & fields.keys():
        data["controls"] = controls
    if isinstance(path := fields.get("input_video"), str):
        data["input_video"] = str(expand_home(path))
    if "width" in fields or "height" in fields:
        data["size"] = _size(fields)
    return data


def _items(name: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns images, clips or controls as the fields of each: a field has a path, an object, or a list of either."""
    value = fields.get(name, [])
    items = []
    for item in value if isinstance(value, list) else [value]:
        data = {"media": item} if isinstance(item, str) else item
        if not isinstance(data, Mapping) or not isinstance(data.get("media"), str):
            raise RequestError(
                f'{name} is {quote(value)}; it must be a path, an object such as {{"media": "a.png", "frame": 0}}, or '
                "a list of these."
            )
        items.append({**data, "media": str(expand_home(data["media"]))})
    return items


def _size(fields: Mapping[str, Any]) -> str:
    if "size" in fields or "width" not in fields or "height" not in fields:
        raise RequestError("give size, or width with height.")
    return f"{fields['width']}x{fields['height']}"


def _seconds(fields: Mapping[str, Any], defaults: RowDefaults) -> float | None:
    if "seconds" not in fields:
        return None if "frames" in fields else defaults.seconds
    if "frames" in fields:
        raise RequestError("give frames or seconds, not both.")
    if not is_number(fields["seconds"]) or fields["seconds"] <= 0:
        raise RequestError(f"seconds is {quote(fields['seconds'])}; it must be a number above 0.")
    return float(fields["seconds"])


def _loras(fields: Mapping[str, Any], folder: Path) -> list[Lora]:
    if "lora" in fields and "loras" in fields:
        raise RequestError("give lora or loras, not both.")
    values = [fields["lora"]] if "lora" in fields else fields["loras"]
    if not isinstance(values, list):
        raise RequestError(f"loras is {quote(values)}; it must be a list. For a single one, give lora.")
    loras = [
        Lora(**check_fields(Lora, value, "a LoRA")) if isinstance(value, Mapping) else Lora.parse(value)
        for value in values
    ]
    return [replace(lora, path=_find_beside(lora.path, folder)) for lora in loras]


def _engine(fields: Mapping[str, Any], defaults: RowDefaults, folder: Path) -> dict[str, Any]:
    """Returns what tells the model of a row, but for its LoRAs: the default one, or its own without what suits that."""
    if "model" not in fields:
        return dict(defaults.engine)
    if not isinstance(model := fields["model"], str) or not model:
        raise RequestError(f"model is {quote(model)}; it must be a name of `kadr models`, or a path.")
    check_path("model", model)
    engine = {name: value for name, value in defaults.engine.items() if name not in _OF_ONE_MODEL}
    return {**engine, "model": _find_beside(model, folder), **({"recipe": None} if defaults.has_recipe else {})}


def _find_beside(name_or_path: str, folder: Path) -> str:
    """Returns the absolute path of a file that lies in or is relative to a folder; a name where there is no such."""
    path = folder / expand_home(name_or_path)
    return str(path) if os.path.exists(path) else name_or_path
