"""Tests, files, links, floors and releases that the documents name exist, and none is missing."""

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
TEST_REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FILE_REFERENCE = re.compile(r"`((?:\w+/)+\w+\.py)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def fixtures_by_test(path: Path) -> dict[str, set[str]]:
    """Returns the tests of a file, each with the fixtures it uses."""
    functions = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    fixtures = {function.name: {arg.arg for arg in function.args.args} for function in functions}
    return {name: names for name, names in fixtures.items() if name.startswith("test_")}


def missing_tests(text: str) -> list[str]:
    """Returns the tests that a text names and that do not exist."""
    references = sorted(set(TEST_REFERENCE.findall(text)))
    paths = {file for file, _ in references if (ROOT / file).is_file()}
    known = {file: fixtures_by_test(ROOT / file) for file in paths}
    return [f"{file}::{test}" for file, test in references if test not in known.get(file, ())]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_files_and_links_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    assert missing_tests(text) == []
    roots = (ROOT, PACKAGE, PACKAGE.parent)
    assert [file for file in FILE_REFERENCE.findall(text) if not any((root / file).is_file() for root in roots)] == []
    assert [link for link in LINK.findall(text) if not (path.parent / link).exists()] == []


def test_missing_test_is_noticed() -> None:
    this_file = "tests/contracts/test_documents.py"
    assert missing_tests(f"`{this_file}::test_missing_test_is_noticed`") == []
    for missing in (f"{this_file}::test_gone", "tests/test_gone.py::test_gone", f"{this_file}::missing_tests"):
        assert missing_tests(f"`{missing}`") == [missing]


def test_floors_in_documents_are_those_enforced() -> None:
    """To update the table: python -m tests.write_floors."""
    pages = {path: path.read_text("utf-8") for path in DOCUMENTS}
    assert doc_tables.read_table(pages[write_floors.PAGE], write_floors.NAME) == write_floors.floors_table()
    pages_with_floors = [path for path, page in pages.items() if re.search(r"^\| *floor *\|", page, re.MULTILINE)]
    assert pages_with_floors == [write_floors.PAGE]


@pytest.mark.parametrize("name", write_models.TABLES)
def test_models_page_matches_the_registry(name: str) -> None:
    """To update the tables: python -m tests.write_models."""
    assert doc_tables.read_table(write_models.PAGE.read_text("utf-8"), name) == write_models.TABLES[name]()


def test_models_page_names_a_test_for_every_release() -> None:
    page = write_models.PAGE.read_text("utf-8")
    rows = [line for name in ("models", "components") for line in doc_tables.read_table(page, name).splitlines()]
    for release in RELEASES:
        (row,) = [row for row in rows if row.startswith(f"| `{release.name}` |")]
        assert TEST_REFERENCE.search(row)


def test_interop_page_shows_every_cell_by_a_test() -> None:
    table = doc_tables.read_table((DOCS / "reference" / "interop.md").read_text("utf-8"), "interop")
    _, _, *lines = table.splitlines()
    assert len(lines) > 10
    for line in lines:
        kind, opened, written, *readers = [cell.strip() for cell in line.strip("|").split("|")]
        cells = [opened, written, *readers]
        assert len(cells) == 6, kind
        assert all(cell == "–" or TEST_REFERENCE.fullmatch(cell) for cell in cells), kind
        assert opened != "–", kind
        # A file that kadr writes is read by another program, and one that it does not write by none.
        assert (written != "–") == any(cell != "–" for cell in readers), kind


def test_parity_page_lists_exactly_the_tests_using_parity() -> None:
    """To update the table: make parity."""
    table = doc_tables.read_table(write_parity.PAGE.read_text("utf-8"), write_parity.NAME)
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    tests_using_parity = {
        (path.relative_to(ROOT).as_posix(), test)
        for path in paths
        for test, fixtures in fixtures_by_test(path).items()
        if "parity" in fixtures
    }
    assert set(TEST_REFERENCE.findall(table)) == tests_using_parity
    stages = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert stages == sorted(stages, key=write_parity.PARITY_STAGES.index)
    assert set(stages) == set(write_parity.PARITY_STAGES)
