"""The performance page: tables between its marks come from the results, and the rest stays."""

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
    "instruction_sets": ["avx2"],
    "torch": "2.13.0",
    "kadr": "0.1.0",
    "revision": "abc",
    "load": 0.5,
}
FIGURE = {
    "name": "kadr auto",
    "dtype": "bfloat16",
    "median": 1.0,
    "interquartile_range": 0.012,
    "ratio": 1.0,
    "flops_per_second": 3.21e11,
    "matmul_per_second": 4e11,
    "share_of_matmul": 0.8025,
    "peak_bytes": 47_000_000,
    "weight_bytes": 3_850_000_000,
    "error": 0.0061,
    "note": "",
}
PEER = {**FIGURE, "name": "peer", "median": 0.5, "ratio": 0.5, "peak_bytes": None, "error": 0.0, "note": "was compiled"}
CASE = {
    "model": "2b",
    "blocks": [4, 28],
    "size": "512x320x25",
    "stage": "dit",
    "schedule": None,
    "reference": "kadr float32",
    "contenders": [FIGURE, PEER],
    "skipped": [{"name": "OpenVINO", "reason": "not installed: ImportError: no"}],
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


def write_report(page: Path, results: Path) -> str:
    assert report.main(["--page", str(page), "--results", str(results), "--plot", str(results / "x.svg")]) == 0
    return page.read_text("utf-8")


def test_tables_go_between_the_marks_and_the_rest_stays(page: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RESULT))
    first = write_report(page, tmp_path)
    assert first.startswith("# Before\n")
    assert "between\n" in first
    assert first.endswith("after\n")
    assert "| kadr auto | bfloat16 | 1 s | 12 ms | 1.00 | 0.321 | 80 % | 47 MB | 3.85 GB | 6.1e-3 |" in first
    assert write_report(page, tmp_path) == first


def test_a_page_without_figures_says_so(page: Path, tmp_path: Path) -> None:
    assert write_report(page, tmp_path).count("Nothing yet.") == 2


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="has no marks for"):
        write_report(tmp_path / "page.md", tmp_path)


def test_a_section_names_active_blocks_and_skipped_contenders() -> None:
    section = report.cases_section([RESULT])
    assert "**2b, 4 of 28 blocks, 512x320x25: dit** (matmul: bfloat16 0.4 TFLOP/s)" in section
    assert "- OpenVINO: not installed: ImportError: no\n" in section
    assert "- peer: was compiled\n" in section
    assert "Test 3000, 2 cores, 2 threads (avx2); torch 2.13.0, kadr 0.1.0 at abc; the load before was 0.5" in section


def test_a_missing_reference_is_noted() -> None:
    assert "not compared: too large" in text_report.case_notes({**CASE, "reference": "not compared: too large"})


def test_empty_columns_are_dropped() -> None:
    partial = {
        **FIGURE,
        "flops_per_second": None,
        "share_of_matmul": None,
        "matmul_per_second": None,
        "weight_bytes": None,
    }
    head = next(text_report.align_columns([text_report.REPORT_COLUMNS, text_report.contender_row(partial)]))
    assert head.split("  ")[-3:] == ["time / kadr's", "memory", " error"]


@pytest.mark.parametrize(
    "value, words", [(0.01234, "12.3 ms"), (1.0, "1 s"), (93.26, "93.3 s"), (1234.5, "1234 s")], ids=str
)
def test_times_have_three_digits(value: float, words: str) -> None:
    assert text_report.format_seconds(value) == words


def test_the_page_matches_the_results() -> None:
    """To repair it: python -m benchmarks.report."""
    cases, growth = report.read_results(report.RESULTS)
    page = report.PAGE.read_text("utf-8")
    assert doc_tables.read_table(page, report.CASES_MARK) == report.cases_section(cases)
    assert doc_tables.read_table(page, report.GROWTH_MARK) == report.growth_section(growth)
