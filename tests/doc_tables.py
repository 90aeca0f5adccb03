"""Tables in pages of docs/ that are made from what the code says, between two marks; the rest is written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def marks(name: str) -> tuple[str, str]:
    """What stands before the table of that name, and what behind."""
    return f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    first, *others = ["| " + " | ".join(cells) + " |\n" for cells in (head, *rows)]
    return first + "|" + "---|" * (first.count(" | ") + 1) + "\n" + "".join(others)


def read_table(page: str, name: str) -> str:
    """The table that a page has now."""
    begin, end = marks(name)
    return page.partition(begin)[2].partition(end)[0]


def write_table(path: Path, name: str, table: str) -> None:
    """Put a table into a page.

    Raises:
        ValueError: the page has no place for it.
    """
    page = path.read_text("utf-8")
    begin, end = marks(name)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path} has no place for {name}: it must have {begin!r} and {end!r}, once each")
    before, _, rest = page.partition(begin)
    path.write_text(before + begin + table + end + rest.partition(end)[2], "utf-8")
