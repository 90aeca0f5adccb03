"""HTML for notebooks. Every text is escaped: for HTML, and control codes and direction marks as in messages."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from kadr.quoting import escape

_VOID_TAGS = ("img", "br")
_CELL_STYLE = "text-align:left;vertical-align:top"


def text(value: object) -> str:
    """Returns a text for HTML."""
    return html.escape(escape(str(value)))


def element(tag: str, content: str = "", /, **attributes: str | int | bool) -> str:
    """Returns an element with HTML inside. An attribute that is True has no value, one that is False is left out."""
    parts = [tag]
    for name, value in attributes.items():
        if value is True:
            parts.append(name)
        elif value is not False:
            parts.append(f'{name}="{text(value)}"')
    return f"<{' '.join(parts)}>" + ("" if tag in _VOID_TAGS else f"{content}</{tag}>")


def lines(values: Iterable[object]) -> str:
    """Returns a line of text for each value; "" for none."""
    return "".join(element("div", text(value)) for value in values)


def table(rows: Iterable[Sequence[object]], *, head: Sequence[object] = ()) -> str:
    """Returns a table of texts, with a row of headings if there are any."""
    return table_of_html((map(text, row) for row in rows), head=head)


def table_of_html(rows: Iterable[Iterable[str]], *, head: Sequence[object] = ()) -> str:
    """Returns a table whose cells are HTML, aligned to the left; headings are texts."""
    top = element("thead", _row("th", map(text, head))) if head else ""
    return element("table", top + element("tbody", "".join(_row("td", row) for row in rows)))


def _row(tag: str, cells: Iterable[str]) -> str:
    return element("tr", "".join(element(tag, cell, style=_CELL_STYLE) for cell in cells))


def data_url(content: bytes, media_type: str) -> str:
    """Returns an address that contains a file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
