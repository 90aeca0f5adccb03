"""JSON of other programs: deep nesting is refused, and what is no JSON where it must be strict."""

from __future__ import annotations

import math

import pytest

from kadr.json_reader import MAX_JSON_DEPTH, parse_json

NOT_STRICT = {
    '{"a": 1, "a": 2}': "has 'a' twice",
    '[{"b": {"a": 1, "a": 1}}]': "has 'a' twice",
    "[NaN]": "NaN is not a number",
    '{"a": -Infinity}': "-Infinity is not a number",
    "1e999": "too large",
    '["\\ud800"]': "half a character",
    '{"\\udfff": 1}': "half a character",
    '"\\ud800"': "half a character",
}


@pytest.mark.parametrize("text, message", NOT_STRICT.items())
def test_strict_reading_refuses_what_is_no_json_or_lost(text: str, message: str) -> None:
    parse_json(text)
    with pytest.raises(ValueError, match=message):
        parse_json(text, is_strict=True)


def test_strict_reading_takes_all_other_json() -> None:
    text = '{"a": [1, -2.5e300, "é\\ud83d\\ude00", null, true, {}], "b": 10000000000000000000000}'
    assert parse_json(text, is_strict=True) == parse_json(text)
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    assert math.isnan(parse_json("NaN"))


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize("begin, end", [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused(begin: str, end: str, is_strict: bool) -> None:
    def nested(depth: int) -> str:
        return begin * depth + "1" + end * depth

    parse_json(nested(MAX_JSON_DEPTH), is_strict=is_strict)
    for depth in (MAX_JSON_DEPTH + 1, 100_000):
        with pytest.raises(ValueError, match="deep"):
            parse_json(nested(depth), is_strict=is_strict)
