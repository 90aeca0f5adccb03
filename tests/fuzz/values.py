"""Hostile values: for flags, for JSON, YAML and binary fields. None of them asks for a long computation."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

HOSTILE_TEXTS = (
    "",
    " ",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\rb\nc\td",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "\x80\x9b2J\xad",
    "e\u0301" * 40,
    "\ud800",
    "x" * 5000,
    "/" * 300,
    "../../../../etc/passwd",
    "a/" * 3000,
    "y" * 256,
    "%s%n{0}{x!r}",
    "nan",
    "None",
    "-",
    "--",
    "~",
    "~nobody-of-this-name/x",
    "file:///etc/passwd",
    "|",
    "#0:1",
    "demo",
    "ltxv-2b-0.9.8-distilled",
)
HOSTILE_NUMBERS = (
    *(
        "",
        " ",
        "-",
        "--",
        "0",
        "-1",
        "-0",
        "0.5",
        "1e308",
        "-1e308",
        "1e309",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "1e",
        ".",
        "1_0",
    ),
    *(
        "9" * 5000,
        "-" + "9" * 5000,
        "0." + "9" * 5000,
        "0x10",
        "1e-400",
        "²",
        "١٢",
        "１２",
        "1,,2",
        ",",
        "1,nan",
        "1;2",
    ),
    *("2147483648", "9223372036854775808", "18446744073709551616", "1/0", "True", "null", "\x1b[2J", "1" + "0" * 400),
)


def numbers() -> st.SearchStrategy[str]:
    """Texts given where a number is asked for."""
    return st.one_of(
        st.sampled_from(HOSTILE_NUMBERS),
        st.floats(width=32).map(str),
        st.integers(-(10**30), -1).map(str),
        st.text(max_size=12).filter(lambda text: "\0" not in text),
    )


def texts(max_size: int = 60) -> st.SearchStrategy[str]:
    """Texts without NUL, as no argument can contain one; surrogates stand for bytes that are not UTF-8."""
    characters = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
    bytes_that_are_not_text = st.sampled_from("\udc80\udcff")
    return st.one_of(
        st.sampled_from(HOSTILE_TEXTS).map(lambda text: text.replace("\ud800", "\udced")),
        st.text(st.one_of(characters, bytes_that_are_not_text), max_size=max_size),
    )


def nested(depth: int) -> str:
    """JSON text of lists in each other."""
    return "[" * depth + "]" * depth


# JSON as text, because json.dumps writes neither thousands of digits nor thousands of levels.
_RAW_JSON = (
    "9" * 5000,
    "-" + "9" * 4000,
    "1e999",
    "-1e999",
    "NaN",
    nested(20),
    nested(200),
    nested(100_000),
    '"\\ud800"',
)


def json_values() -> st.SearchStrategy[str]:
    """Texts of JSON values of any type."""
    leaves: st.SearchStrategy[Any] = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from((-1, 0, 1, 3, 10**9, -(10**9), 2**31, 2**63, 2**64, 10**400, 0.0, -0.5, 1e308, 5e-324)),
        st.floats(),
        st.sampled_from(HOSTILE_TEXTS),
        st.text(max_size=20),
    )
    values = st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
        max_leaves=6,
    )
    return st.one_of(values.map(json.dumps), st.sampled_from(_RAW_JSON))


def replace_value(data: Any, draw: Any) -> str:
    """Returns JSON text of plain data in which one entry, at any depth, is hostile, missing or there twice."""
    if isinstance(data, dict) and data:
        key = draw(st.sampled_from(sorted(data)))
        action = draw(st.sampled_from(("value", "value", "value", "drop", "twice", "rename")))
        parts = {name: json.dumps(value) for name, value in data.items()}
        name = json.dumps(key)
        rest = [f"{json.dumps(other)}: {text}" for other, text in parts.items() if other != key]
        if action == "drop":
            return f"{{{', '.join(rest)}}}"
        if action == "twice":
            return f"{{{', '.join([*rest, f'{name}: {parts[key]}', f'{name}: {draw(json_values())}'])}}}"
        if action == "rename":
            new = json.dumps(draw(st.sampled_from(HOSTILE_TEXTS)))
            return f"{{{', '.join([*rest, f'{new}: {parts[key]}'])}}}"
        inner = replace_value(data[key], draw)
        return f"{{{', '.join([*rest, f'{name}: {inner}'])}}}"
    if isinstance(data, list) and data and draw(st.booleans()):
        index = draw(st.integers(0, len(data) - 1))
        parts_of_list = [json.dumps(item) for item in data]
        parts_of_list[index] = replace_value(data[index], draw)
        return f"[{', '.join(parts_of_list)}]"
    return draw(json_values())


def damage(data: bytes, draw: Any, *, within: int | None = None) -> bytes:
    """Returns bytes cut short, changed, repeated or extended, in their first `within` bytes."""
    end = min(within or len(data), len(data))
    kind = draw(st.sampled_from(("cut", "flip", "flip", "fill", "insert", "append", "empty")))
    position = draw(st.integers(0, max(0, end - 1)))
    if kind == "empty":
        return b""
    if kind == "cut":
        return data[:position]
    if kind == "append":
        return data + draw(st.binary(min_size=1, max_size=64))
    if kind == "insert":
        return data[:position] + draw(st.binary(min_size=1, max_size=16)) + data[position:]
    size = draw(st.integers(1, 8))
    values = (
        draw(st.sampled_from((b"\0", b"\xff", b"\x7f", b"\x80"))) * size
        if kind == "fill"
        else draw(st.binary(min_size=size, max_size=size))
    )
    return data[:position] + values + data[position + len(values) :]
