"""Reads JSON that other programs wrote: what is nested too deeply is refused like a syntax error."""

from __future__ import annotations

import json
from typing import Any

from kadr.quoting import quote

MAX_JSON_DEPTH = 64  # objects and lists in each other; what kadr and the official package write has 7


def parse_json(text: str | bytes, *, allows_duplicates: bool = True) -> Any:
    """Parses a JSON text.

    Args:
        allows_duplicates: of a key that an object has twice, the last value counts; otherwise it is refused.

    Raises:
        ValueError: it is not JSON, is nested more than `MAX_JSON_DEPTH` deep, or has a number of thousands of digits.
    """
    try:
        data = json.loads(text, object_pairs_hook=None if allows_duplicates else _refuse_duplicates)
    except RecursionError as error:
        raise _too_deep() from error
    level, depth = [data], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise _too_deep()
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return data


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of pairs of keys and values."""
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"it has {quote(key)} twice")
        data[key] = value
    return data
