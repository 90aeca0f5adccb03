"""Puts benchmarks/results/*.json into docs/performance.md, between its marks: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kadr.bench import text_report
from tests import doc_tables

RESULTS = Path(__file__).parent / "results"
PAGE, PLOT = doc_tables.DOCS / "performance.md", doc_tables.DOCS / "images" / "growth.svg"
CASES_MARK, GROWTH_MARK = "python -m benchmarks", "python -m benchmarks.growth"
Result = Mapping[str, Any]


def read_results(folder: Path) -> tuple[list[Result], list[Result]]:
    """Reads the results of cases, and those of growth, sorted by file name."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    return [each for each in results if "cases" in each], [each for each in results if "curves" in each]


def cases_section(results: Sequence[Result]) -> str:
    """Returns a section for each result file: command, date and machine, and a table for each case."""
    sections = []
    for result in results:
        machine, date = result["machine"], result["date"].partition("T")[0]
        load = f"; the load before was {machine['load']:.1f}" if machine["load"] is not None else ""
        sections.append(f"\n`{result['command']}`, {date}: {text_report.machine_line(machine)}{load}.\n")
        sections += [_case_section(case) for case in result["cases"]]
    return "".join(sections) or "\nNothing yet.\n"


def _case_section(case: Mapping[str, Any]) -> str:
    rows = [text_report.REPORT_COLUMNS, *(text_report.contender_row(each) for each in case["contenders"])]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    head, *body = zip(*columns, strict=True)
    title = f"\n**{text_report.case_title(case)}**{text_report.yardstick_rates(case)}\n\n"
    notes = "".join(f"- {line}\n" for line in text_report.case_notes(case))
    return title + doc_tables.markdown_table(head, body) + (f"\n{notes}" if notes else "")


def growth_section(results: Sequence[Result]) -> str:
    """Returns a table with a line for each curve, and the plot."""
    if not results:
        return "\nNothing yet.\n"
    head = ("model", "cost", "range", "", "measured exponent", "expected exponent")
    rows = []
    for result in results:
        for curve in result["curves"]:
            fitted = "" if curve["exponent"] is None else f"{curve['exponent']:.2f}"
            value_range = f"{curve['x'][0]} to {curve['x'][-1]} {curve['variable']}"
            expected = f"{curve['expected_exponent']:.2f}"
            rows.append((_growth_title(result), curve["quantity"], value_range, curve["contender"], fitted, expected))
    machines = "; ".join(dict.fromkeys(text_report.machine_line(result["machine"]) for result in results))
    plot = "![time and memory over tokens and frames, with the expected slopes dotted](images/growth.svg)"
    return f"\n{doc_tables.markdown_table(head, rows)}\n{machines}.\n\n{plot}\n"


def _growth_title(result: Result) -> str:
    return str(result["model"]) + (f", {result['num_layers']} blocks" if result["num_layers"] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args(arguments)
    cases, growth = read_results(options.results)
    if growth:
        try:
            from benchmarks.plot import draw_curves
        except ImportError as error:
            print(f"error: {error}; install kadr[bench]", file=sys.stderr)
            return 1
        draw_curves(options.plot, {_growth_title(result): result["curves"] for result in growth})
    doc_tables.write_table(options.page, CASES_MARK, cases_section(cases))
    doc_tables.write_table(options.page, GROWTH_MARK, growth_section(growth))
    print(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
