"""Documents name what exists: tests, files, links, floors, and every released model in its table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kadr.models.registry import RELEASES
from tests import doc_tables, write_floors, write_models, write_parity
from tests.doc_tables import DOCS, ROOT

DOCUMENTS = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PACKAGE = ROOT / "src" / "kadr"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FILE = re.compile(r"`((?:\w+/)+\w+\.py)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def claims(path: Path) -> dict[str, set[str]]:
    """The tests of a file, and what each asks for."""
    functions = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    asked = {function.name: {one.arg for one in function.args.args} for function in functions}
    return {name: fixtures for name, fixtures in asked.items() if name.startswith("test_")}


def missing_tests(text: str) -> list[str]:
    """The tests that a text names and that do not exist."""
    named = sorted(set(NAMED.findall(text)))
    paths = {file for file, _ in named if (ROOT / file).is_file()}
    known = {file: claims(ROOT / file) for file in paths}
    return [f"{file}::{test}" for file, test in named if test not in known.get(file, ())]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_files_and_links_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    assert missing_tests(text) == []
    homes = (ROOT, PACKAGE, PACKAGE.parent)
    assert [file for file in FILE.findall(text) if not any((home / file).is_file() for home in homes)] == []
    assert [link for link in LINK.findall(text) if not (path.parent / link).exists()] == []


def test_a_test_that_does_not_exist_would_be_noticed() -> None:
    here = "tests/contracts/test_documents.py"
    assert missing_tests(f"`{here}::test_a_test_that_does_not_exist_would_be_noticed`") == []
    for gone in (f"{here}::test_gone", "tests/test_gone.py::test_gone", f"{here}::missing_tests"):
        assert missing_tests(f"`{gone}`") == [gone]


def test_the_floors_in_the_documents_are_those_that_are_held() -> None:
    """If it fails: python -m tests.write_floors."""
    pages = {path: path.read_text("utf-8") for path in DOCUMENTS}
    assert doc_tables.read_table(pages[write_floors.PAGE], write_floors.NAME) == write_floors.floors_table()
    listed = [path for path, page in pages.items() if re.search(r"^\| *floor *\|", page, re.MULTILINE)]
    assert listed == [write_floors.PAGE]


@pytest.mark.parametrize("name", write_models.TABLES)
def test_the_page_of_models_is_what_the_registry_says(name: str) -> None:
    """If it fails: python -m tests.write_models."""
    assert doc_tables.read_table(write_models.PAGE.read_text("utf-8"), name) == write_models.TABLES[name]()


def test_every_entry_of_the_registry_is_in_the_page_of_models_with_its_test() -> None:
    page = write_models.PAGE.read_text("utf-8")
    rows = [line for name in ("models", "components") for line in doc_tables.read_table(page, name).splitlines()]
    for released in RELEASES:
        (row,) = [row for row in rows if row.startswith(f"| `{released.name}` |")]
        assert NAMED.search(row)


def test_every_test_that_notes_an_error_is_in_the_page_of_parity_and_no_other() -> None:
    """If it fails: make parity."""
    table = doc_tables.read_table(write_parity.PAGE.read_text("utf-8"), write_parity.NAME)
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    asking = {
        (path.relative_to(ROOT).as_posix(), test)
        for path in paths
        for test, fixtures in claims(path).items()
        if "parity" in fixtures
    }
    assert set(NAMED.findall(table)) == asking
    stages = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert stages == sorted(stages, key=write_parity.PARITY_STAGES.index)
    assert set(stages) == set(write_parity.PARITY_STAGES)
