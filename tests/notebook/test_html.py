"""HTML of tables and lines: whatever the texts, it is well formed and shows them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kadr.notebook.html import data_url, element, lines, table
from kadr.quoting import escape
from tests.html_reader import HtmlReader

HOSTILE = '</td><script>alert("x")</script>&amp; \' \x1b[31m \u202e'


def test_table_shows_its_cells_under_its_head() -> None:
    reader = HtmlReader.read(table([("denoise", 3)], head=("stage", "step")))
    assert reader.texts == ["stage", "step", "denoise", "3"]
    assert [each.tag for each in reader.elements] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]


@given(st.text())
def test_text_is_shown_escaped_and_is_never_markup(value: str) -> None:
    for written in (table([(value,)]), table([], head=(value,)), lines([value])):
        reader = HtmlReader.read(written)
        assert "".join(reader.texts) == escape(value)
        assert {each.tag for each in reader.elements} <= {"table", "thead", "tbody", "tr", "td", "th", "div"}


def test_attributes_are_escaped_and_switches_have_no_value() -> None:
    written = element("video", src=HOSTILE, controls=True, loop=False)
    assert HtmlReader.read(written).find("video") == {"src": escape(HOSTILE), "controls": None}


def test_data_url_contains_the_file() -> None:
    head, _, content = data_url(b"\x00\xff", "video/mp4").partition(",")
    assert (head, base64.b64decode(content)) == ("data:video/mp4;base64", b"\x00\xff")


@pytest.mark.parametrize("text", ["<p>", "<p></div>", "<div><p></div></p>"])
def test_html_that_is_not_well_formed_is_noticed(text: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        HtmlReader.read(text)
