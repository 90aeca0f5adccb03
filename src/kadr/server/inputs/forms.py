"""Reads the fields of a form as an object: a[b] is b of the object a, a[] an entry of the list a, as clients write it.

A list of objects is written as a[][b] and a[][c]. Some clients send all b before all c, others one object after the
other: either way the n-th b and the n-th c are of the n-th object, if there are as many of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from kadr.json_reader import parse_json
from kadr.quoting import quote, show
from kadr.server.errors import ApiError

MAX_NESTED_KEYS = 4
_KEY = re.compile(r"\[([^\[\]]*)\]")
_ENTRY = ""  # the key of an entry of a list
# Fields that are text whatever stands in them: a prompt may read "42" or "true".
_TEXT_FIELDS = {
    *("prompt", "negative_prompt", "prompts", "model", "size", "seconds", "sampler", "input_video", "before"),
    *("media", "name", "id", "file_id", "image_url"),
}
_TEXT_OR_OBJECT_FIELDS = {"video", "input_reference", "lora", "loras", "cache"}  # a LoRA may be called 42

Path = tuple[str, ...]


def parse_fields(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Returns the fields of a form as an object.

    Values are text. One that reads as JSON, such as a number, an object or true, is that, for fields that can be it.

    Raises:
        ApiError: a name is not that of a field, a field is there twice, or objects cannot be told apart.
    """
    values: dict[Path, list[Any]] = {}
    for name, text in fields:
        path = _path(name)
        values.setdefault(path, []).append(_value(path, text))
    data: dict[str, Any] = {}
    lists: dict[Path, list[dict[str, Any]]] = {}
    for path, entries in values.items():
        if _ENTRY not in path:
            if len(entries) > 1:
                raise double_field(_name(path))
            _put(data, path, entries[0], path)
        elif path.index(_ENTRY) == len(path) - 1:
            _put(data, path[:-1], entries, path)
        else:
            _put_in_objects(data, lists, path, entries)
    return data


def double_field(name: str) -> ApiError:
    """Returns the error for a field that is there twice."""
    return ApiError(400, f"{quote(name)} is given twice.", code="invalid_body", param=show(name))


def _put_in_objects(
    data: dict[str, Any], lists: dict[Path, list[dict[str, Any]]], path: Path, entries: list[Any]
) -> None:
    """Puts the n-th value into the n-th object of a list."""
    before, after = path[: path.index(_ENTRY)], path[path.index(_ENTRY) + 1 :]
    if before not in lists:
        lists[before] = [{} for _ in entries]
        _put(data, before, lists[before], path)
    if _ENTRY in after or len(lists[before]) != len(entries):
        name = _name(before)
        raise ApiError(
            400,
            f"the objects of {quote(name)} cannot be told apart in a form. Send the list as one field, {show(name)}, "
            "whose text is JSON.",
            code="invalid_body",
            param=show(name),
        )
    for target, entry in zip(lists[before], entries, strict=True):
        _put(target, after, entry, path)


def _put(data: dict[str, Any], path: Path, value: Any, full_path: Path) -> None:
    for key in path[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise double_field(_name(full_path))
    if path[-1] in data:
        raise double_field(_name(full_path))
    data[path[-1]] = value


def _path(name: str) -> Path:
    """Returns the root of a name and the keys in its brackets."""
    root, bracket, rest = name.partition("[")
    keys = _KEY.findall(bracket + rest)
    if not root or len(keys) > MAX_NESTED_KEYS or _name((root, *keys)) != name:
        raise ApiError(400, f"{quote(name)} is not the name of a field.", code="invalid_body", param=show(name))
    return (root, *keys)


def _name(path: Path) -> str:
    root, *keys = path
    return root + "".join(f"[{key}]" for key in keys)


def _value(path: Path, text: str) -> Any:
    if not _TEXT_FIELDS.isdisjoint(path):
        return text
    try:
        value = parse_json(text, is_strict=True)
    except ValueError:
        return text
    is_text = not _TEXT_OR_OBJECT_FIELDS.isdisjoint(path) and not isinstance(value, dict | list)
    return text if is_text else value
