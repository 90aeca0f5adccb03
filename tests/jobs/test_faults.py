"""A real process serves a queue, and dies or loses its disk or its database: nothing is lost or made twice.

`python -m tests.write_faults` does the same in full, with the demo model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import doc_tables, write_faults
from tests.jobs import faults
from tests.jobs.faults import CASES, Bench, Outcome, run_case


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_is_lost_or_made_twice(case: Callable[[Bench, int], Outcome], tmp_path: Path) -> None:
    _, times = CASES[case]
    outcome = run_case(case, tmp_path / "bench", "fake", times, seed=0)
    if outcome is None:
        assert case in (faults.fill_disk, faults.lock_folder)
        pytest.skip("needs a mount, or a process without the rights of root")
    assert outcome.times == times
    assert outcome.kept.endswith("none made twice")


def test_page_has_a_row_for_each_fault() -> None:
    """To update the table: make faults ARGS=--write."""
    _, _, *rows = doc_tables.read_table(write_faults.PAGE.read_text("utf-8"), write_faults.NAME).splitlines()
    assert len(rows) == len(CASES)
    for row in rows:
        fault, times, happened, kept = (cell.strip() for cell in row.strip("|").split(" | "))
        assert int(times) > 0
        assert fault
        assert happened
        assert kept.endswith("none made twice")
