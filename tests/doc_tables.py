"""Generates tables in pages of docs/ between two marks; the rest of a page is written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def marks(name: str) -> tuple[str, str]:
    """Returns the lines before and after the table of a name."""
    return f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Formats a table in Markdown."""
    head, *lines = ["| " + " | ".join(cells) + " |\n" for cells in (columns, *rows)]
    return head + "|" + "---|" * (head.count(" | ") + 1) + "\n" + "".join(lines)


def read_table(page: str, name: str) -> str:
    """Returns the table that a page has now."""
    begin, end = marks(name)
    return page.partition(begin)[2].partition(end)[0]


def write_table(path: Path, name: str, table: str) -> None:
    """Writes a table into a page.

    Raises:
        ValueError: the page does not have the marks of the table.
    """
    page = path.read_text("utf-8")
    begin, end = marks(name)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path} has no marks for {name}: it must have {begin!r} and {end!r}, once each")
    before, _, rest = page.partition(begin)
    path.write_text(before + begin + table + end + rest.partition(end)[2], "utf-8")
