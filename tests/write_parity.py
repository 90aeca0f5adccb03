"""Measures kadr against its oracles and writes the errors into docs/parity.md: `make parity`.

Runs the tests that use the fixture `parity` of tests/conftest.py. Writes nothing if one of them fails.
"""

from __future__ import annotations

import sys

import pytest

from tests import doc_tables

PAGE = doc_tables.DOCS / "parity.md"
NAME = "make parity"
COLUMNS = ("stage", "family or recipe", "oracle", "largest relative error", "test")
# In the order of a generation: its stages, then the whole pipeline, then the released recipes.
PARITY_STAGES = (
    "sigmas",
    "text encoder",
    "image",
    "clip",
    "VAE encode",
    "transformer",
    "perturbed transformer",
    "step",
    "upscaler",
    "AdaIN",
    "tone map",
    "VAE decode",
    "text to video",
    "image to video",
    "clip at frame 0",
    "keyframe",
    "sequence",
    "multiple conditions",
    "control",
    "video to video",
    "video from latents",
    "two passes",
    "long video",
    "guidance by sigma",
    "CFG-star",
    "STG by attention_values",
    "STG by attention_skip",
    "STG by transformer_block",
    "recipe",
)

Row = tuple[str, str, str, str]  # stage, family, oracle, test


class ParityRecorder:
    """Pytest plugin: runs only the tests that record an error, and keeps the largest error of each row."""

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


def render_table(largest_errors: dict[Row, float]) -> str:
    """Returns the table, sorted by stage.

    Raises:
        ValueError: a stage is not in `PARITY_STAGES`.
    """
    rows = sorted(largest_errors, key=lambda row: (PARITY_STAGES.index(row[0]), row))
    return doc_tables.markdown_table(
        COLUMNS, [(*row[:3], format_error(largest_errors[row]), f"`{row[3]}`") for row in rows]
    )


def format_error(error: float) -> str:
    """Formats an error to one digit, such as 6e-7; 0 if every bit is equal."""
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


def main() -> int:
    recorder = ParityRecorder()
    status = pytest.main(["--rootdir", str(doc_tables.ROOT), str(doc_tables.ROOT / "tests")], plugins=[recorder])
    if status == pytest.ExitCode.OK:
        doc_tables.write_table(PAGE, NAME, render_table(recorder.largest_errors))
        print(PAGE)
    return status


if __name__ == "__main__":
    sys.exit(main())
