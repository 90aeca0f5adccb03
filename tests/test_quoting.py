"""Foreign text in messages is escaped, on one line and short."""

from __future__ import annotations

import pytest

from kadr.errors import KadrError, KadrWarning, PlanError
from kadr.quoting import MAX_LINE, MAX_QUOTED, escape, one_line, quote, shorten, show

HOSTILE = "\x1b[31mred\x07\n\r\t\x9b2J\u202eabc\u200b\u2066\udc80\x00"


@pytest.mark.parametrize("function", [escape, show, quote, one_line])
def test_foreign_text_has_no_unprintable_character_left(function) -> None:  # type: ignore[no-untyped-def]
    assert function(HOSTILE).isprintable()
    assert "\\x1b[31mred" in function(HOSTILE)
    assert "\\u202eabc" in function(HOSTILE)


@pytest.mark.parametrize("text", ["плёнка", "赤い円", "a fox 🦊", "é", "C:\\videos\\a.mp4", ""])
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert escape(text) == show(text) == one_line(text) == text


def test_long_text_keeps_beginning_and_end() -> None:
    shown = shorten("begin" + "x" * 10**6 + "end", 40)
    assert (len(shown), shown[:5], shown[-3:]) == (40, "begin", "end")


def nested(depth: int) -> list:  # type: ignore[type-arg]
    value: list = []  # type: ignore[type-arg]
    for _ in range(depth):
        value = [value]
    return value


def billion_laughs() -> list:  # type: ignore[type-arg]
    value: list = ["ha"]  # type: ignore[type-arg]
    for _ in range(60):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "value",
    [
        "\x1b" * 10**6,
        10**100_000,
        -(10**5000),
        nested(100_000),
        billion_laughs(),
        {"k" * 10**5: [0.5] * 10**5},
        b"\0" * 10**5,
    ],
    ids=["text", "digits", "negative", "deep", "laughs", "dict", "bytes"],
)
def test_any_value_is_quoted_in_a_few_characters(value: object) -> None:
    assert len(quote(value)) <= MAX_QUOTED
    assert quote(value).isprintable()


@pytest.mark.parametrize("value", ["a'b", 3, 0.1, None, True, (1, 2), ["a", 1.5], {"a": None}, {}])
def test_short_value_is_quoted_as_its_repr(value: object) -> None:
    assert quote(value) == repr(value)


def test_message_keeps_its_sentence_around_long_values() -> None:
    message = one_line(f"size is {'9' * 10**6}; write WIDTHxHEIGHT in pixels, and {'y' * 9000} too.")
    assert len(message) <= MAX_LINE
    assert "; write WIDTHxHEIGHT in pixels, and " in message


@pytest.mark.parametrize("kind", [KadrError, KadrWarning, lambda text: PlanError(text, shortfall=1)])
def test_messages_of_errors_and_warnings_are_safe_and_short(kind) -> None:  # type: ignore[no-untyped-def]
    message = str(kind(HOSTILE * 1000))
    assert message.isprintable()
    assert len(message) <= MAX_LINE


def test_details_of_an_error_have_lines_of_their_own() -> None:
    lines = str(KadrError("3 clips:", details=["a\nb", "c\x1b"])).split("\n")
    assert lines == ["3 clips:", "  a b", "  c\\x1b"]
