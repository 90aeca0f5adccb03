"""The comparison of plans with measurements covers what it claims, and prints one row for each case."""

from __future__ import annotations

from pathlib import Path

from benchmarks.plan_accuracy import CASES, COLUMNS, cli_arguments, table_row

LIGHT = [case for case in CASES if not case.is_heavy]


def test_cases_reach_from_the_demo_to_13b_in_a_gguf_file() -> None:
    assert len(LIGHT) >= 12
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.model for case in LIGHT} == {"", "2b", "13b"}
    assert {"Q8_0", "Q4_K_M"} <= {case.gguf for case in LIGHT}
    assert any("--size 768x512 --frames 49" in case.flags and case.model for case in LIGHT)


def test_arguments_of_a_demo_case_have_its_flags_and_image(tmp_path: Path) -> None:
    (case,) = (case for case in LIGHT if case.has_first_image and not case.model)
    arguments = cli_arguments(case, tmp_path, tmp_path)
    assert arguments[1:3] == ["--size", "256x256"]
    assert Path(arguments[-2]).is_file()


def test_row_has_both_ratios() -> None:
    row = table_row("a", {"peak_bytes": 2 * 10**9, "seconds": 30.0}, [10**9, 40.0, 60.0])
    assert len(row) == len(COLUMNS)
    assert row == ["a", "2.00 GB", "1.00 GB", "2.00", "30.0 s", "40.0 s", "0.75"]
