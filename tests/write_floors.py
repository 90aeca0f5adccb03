"""Writes the floors of tests/contracts/test_floors.py into docs/architecture.md: python -m tests.write_floors."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests import doc_tables
from tests.contracts.test_floors import FLOORS, PACKAGE

PAGE = doc_tables.DOCS / "architecture.md"
NAME = "floors"


def purpose(unit: str) -> str:
    """First sentence of a unit's docstring."""
    path = PACKAGE / unit / "__init__.py" if (PACKAGE / unit).is_dir() else PACKAGE / f"{unit}.py"
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def rows() -> Iterator[tuple[str, str, str]]:
    """Floor, unit and what it is for."""
    for floor, units in enumerate(FLOORS):
        for unit in units.split():
            yield str(floor), f"`{unit}`", purpose(unit)


def floors_table() -> str:
    """The table in Markdown."""
    return doc_tables.markdown_table(("floor", "unit", "what it is"), rows())


if __name__ == "__main__":
    doc_tables.write_table(PAGE, NAME, floors_table())
