"""The page: what stands between its marks is what was measured, and the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from kadr.bench import text_report
from tests import doc_tables

MACHINE = {
    "cpu": "Test 3000",
    "cores": 2,
    "threads": 2,
    "instructions": ["avx2"],
    "torch": "2.13.0",
    "kadr": "0.1.0",
    "revision": "abc",
    "load": 0.5,
}
FIGURE = {
    "name": "kadr auto",
    "dtype": "bfloat16",
    "median": 1.0,
    "spread": 0.012,
    "ratio": 1.0,
    "flops_per_second": 3.21e11,
    "matmul_per_second": 4e11,
    "share_of_matmul": 0.8025,
    "peak": 47_000_000,
    "weights": 3_850_000_000,
    "error": 0.0061,
    "note": "",
}
PEER = {**FIGURE, "name": "peer", "median": 0.5, "ratio": 0.5, "peak": None, "error": 0.0, "note": "was compiled"}
CASE = {
    "model": "2b",
    "layers": [4, 28],
    "size": "512x320x25",
    "stage": "dit",
    "schedule": None,
    "compared": "kadr float32",
    "contenders": [FIGURE, PEER],
    "absent": [{"name": "OpenVINO", "reason": "not installed: ImportError: no"}],
}
RESULT: dict[str, Any] = {
    "date": "2026-11-23T00:00:00+00:00",
    "machine": MACHINE,
    "command": "python -m benchmarks",
    "cases": [CASE],
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "performance.md"
    tables = ["".join(doc_tables.marks(name)) for name in (report.CASES_MARK, report.GROWTH_MARK)]
    path.write_text(f"# Before\n{tables[0]}between\n{tables[1]}after\n", "utf-8")
    return path


def written(page: Path, results: Path) -> str:
    assert report.main(["--page", str(page), "--results", str(results), "--picture", str(results / "x.svg")]) == 0
    return page.read_text("utf-8")


def test_figures_go_between_the_marks_and_the_rest_stays(page: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RESULT))
    first = written(page, tmp_path)
    assert first.startswith("# Before\n")
    assert "between\n" in first
    assert first.endswith("after\n")
    assert "| kadr auto | bfloat16 | 1 s | 12 ms | 1.00 | 0.321 | 80 % | 47 MB | 3.85 GB | 6.1e-3 |" in first
    assert written(page, tmp_path) == first


def test_a_page_without_figures_says_so(page: Path, tmp_path: Path) -> None:
    assert written(page, tmp_path).count("Nothing yet.") == 2


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="no place"):
        written(tmp_path / "page.md", tmp_path)


def test_a_table_says_how_many_layers_ran_and_who_did_not() -> None:
    told = report.cases_section([RESULT])
    assert "**2b, 4 of 28 layers, 512x320x25: dit** (matmul: bfloat16 0.4 TFLOP/s)" in told
    assert "- OpenVINO: not installed: ImportError: no\n" in told
    assert "- peer: was compiled\n" in told
    assert "Test 3000, 2 cores, 2 threads (avx2); torch 2.13.0, kadr 0.1.0 at abc; the load before was 0.5" in told


def test_what_was_not_compared_is_told() -> None:
    assert "not compared: too large" in text_report.case_notes({**CASE, "compared": "not compared: too large"})


def test_columns_that_are_empty_are_left_out() -> None:
    bare = {**FIGURE, "flops_per_second": None, "share_of_matmul": None, "matmul_per_second": None, "weights": None}
    head = next(text_report.align_columns([text_report.REPORT_COLUMNS, text_report.contender_row(bare)]))
    assert head.split("  ")[-3:] == ["time / kadr's", "memory", " error"]


@pytest.mark.parametrize(
    "value, words", [(0.01234, "12.3 ms"), (1.0, "1 s"), (93.26, "93.3 s"), (1234.5, "1234 s")], ids=str
)
def test_times_have_three_digits(value: float, words: str) -> None:
    assert text_report.format_seconds(value) == words


def test_the_page_has_what_the_results_say() -> None:
    """Where it has not: python -m benchmarks.report."""
    cases, grown = report.read_results(report.RESULTS)
    page = report.PAGE.read_text("utf-8")
    assert doc_tables.read_table(page, report.CASES_MARK) == report.cases_section(cases)
    assert doc_tables.read_table(page, report.GROWTH_MARK) == report.growth_section(grown)
