"""Reads JSON that other programs wrote: what is nested too deeply is refused like a syntax error."""

from __future__ import annotations

import json
from typing import Any

MAX_JSON_DEPTH = 64  # objects and lists in each other; what kadr and the official package write has 7


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is not JSON, is nested more than `MAX_JSON_DEPTH` deep, or has a number of thousands of digits.
    """
    try:
        data = json.loads(text)
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
