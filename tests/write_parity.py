"""Measures kadr against its oracles, and writes what it finds into docs/parity.md: `make parity`.

Runs the tests that ask for `parity`, of tests/conftest.py. Nothing is written if one of them fails.
"""

from __future__ import annotations

import sys

import pytest

from tests import doc_tables

PAGE = doc_tables.DOCS / "parity.md"
NAME = "make parity"
COLUMNS = ("stage", "family or recipe", "oracle", "largest relative error", "test")
# In the order of a generation: its parts, then the whole path, then the released recipes.
PARITY_STAGES = (
    "noise levels",
    "text encoder",
    "picture",
    "VAE encode",
    "transformer",
    "disturbed transformer",
    "step",
    "upscaler",
    "AdaIN",
    "tone map",
    "VAE decode",
    "text to video",
    "picture to video",
    "clip at frame 0",
    "keyframe",
    "sequence",
    "several conditions",
    "control",
    "video to video",
    "video from latents",
    "two passes",
    "long video",
    "guidance by level",
    "CFG-star",
    "STG by attention_values",
    "STG by attention_skip",
    "STG by transformer_block",
    "recipe",
)

Row = tuple[str, str, str, str]  # stage, family, oracle, test


class ParityRecorder:
    """A plugin of pytest: keeps to the tests that note an error, and keeps the largest of each kind."""

    def __init__(self) -> None:
        self.largest_errors: dict[Row, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if "parity" in getattr(item, "fixturenames", ())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == "parity":
                stage, family, oracle, error = value
                row = stage, family, oracle, report.nodeid.partition("[")[0]
                self.largest_errors[row] = max(error, self.largest_errors.get(row, 0.0))


def render_table(largest: dict[Row, float]) -> str:
    """The table, sorted.

    Raises:
        ValueError: a stage that has no place in `PARITY_STAGES`.
    """
    rows = sorted(largest, key=lambda row: (PARITY_STAGES.index(row[0]), row))
    return doc_tables.markdown_table(COLUMNS, [(*row[:3], format_error(largest[row]), f"`{row[3]}`") for row in rows])


def format_error(error: float) -> str:
    """An error to one digit, such as 6e-7; 0 where every bit is the same."""
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


def main() -> int:
    notes = ParityRecorder()
    status = pytest.main(["--rootdir", str(doc_tables.ROOT), str(doc_tables.ROOT / "tests")], plugins=[notes])
    if status == pytest.ExitCode.OK:
        doc_tables.write_table(PAGE, NAME, render_table(notes.largest_errors))
        print(PAGE)
    return status


if __name__ == "__main__":
    sys.exit(main())
