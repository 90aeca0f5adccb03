"""Compiles every Triton kernel for every target and writes docs/reference/kernels.md's tables: `make kernels`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import triton

from benchmarks.kernels import KernelCase
from tests import doc_tables
from tests.kernels.kernel_targets import (
    DTYPES,
    SHAPES,
    TARGETS,
    NotCompiledError,
    Resources,
    compiler_for,
    variants,
)

PAGE = doc_tables.DOCS / "reference" / "kernels.md"
TABLES = {"NVIDIA": "cuda", "AMD": "hip"}  # name of a table -> backend of its targets
COMPILER = "compiler"  # name of the line about it
NO_FP8 = "no fp8"
FIGURES = re.compile(r"(?P<registers>\d+) · (?P<shared_bytes>\d+) · (?P<spills>\d+)")

Figures = dict[str, Resources]  # kernel -> the largest of each figure; without kernels that a target cannot compile


def targets_of(table: str) -> list[str]:
    """Returns the names of a table's targets."""
    return [name for name, target in TARGETS.items() if target.backend == TABLES[table]]


def kernel_name(case: KernelCase) -> str:
    """Returns the name of a kernel, with what its code depends on besides the dtype."""
    return f"{case.name}, {case.note}" if case.note else case.name


def all_variants() -> Iterator[KernelCase]:
    """Yields the variants of every kernel at every size, in every dtype."""
    for shape in SHAPES:
        for dtype in DTYPES:
            yield from variants(shape, dtype)


def kernel_names() -> list[str]:
    """Returns the names of all kernels, in the order of the tables."""
    return list(dict.fromkeys(map(kernel_name, variants(SHAPES[0], DTYPES[0]))))


def measure_target(target: str) -> Figures:
    """Compiles all variants for a target."""
    figures: Figures = {}
    with compiler_for(target) as compile_case:
        for case in all_variants():
            name = kernel_name(case)
            try:
                resources = compile_case(case).resources
            except NotCompiledError:
                continue
            figures[name] = largest(figures.get(name, resources), resources)
    return figures


def largest(first: Resources, second: Resources) -> Resources:
    """Returns the larger of each figure."""
    return Resources(
        max(first.registers, second.registers),
        max(first.shared_bytes, second.shared_bytes),
        max(first.spills, second.spills),
    )


def format_figures(resources: Resources | None) -> str:
    """Formats a cell of the table."""
    if resources is None:
        return NO_FP8
    return f"{resources.registers} · {resources.shared_bytes} · {resources.spills}"


def read_figures(target: str) -> Figures:
    """Reads from the page what kernels take on a target, as it was measured."""
    page = PAGE.read_text("utf-8")
    (table,) = (table for table in TABLES if target in targets_of(table))
    _, _, *rows = (line.strip("|\n").split("|") for line in doc_tables.read_table(page, table).splitlines())
    column = 1 + targets_of(table).index(target)
    cells = {row[0].strip(" `"): FIGURES.fullmatch(row[column].strip()) for row in rows}
    return {name: Resources(*map(int, cell.groups())) for name, cell in cells.items() if cell}


def render_table(table: str) -> str:
    """Returns a table of kernels by targets."""
    figures = {}
    for target in targets_of(table):
        figures[target] = measure_target(target)
        print(f"{target}: {len(figures[target])} kernels", file=sys.stderr)
    rows = (
        (f"`{name}`", *(format_figures(of_target.get(name)) for of_target in figures.values()))
        for name in kernel_names()
    )
    return doc_tables.markdown_table(("kernel", *figures), rows)


def compiler_line() -> str:
    """Returns the line that names the compiler."""
    return f"Compiled by triton {triton.__version__}.\n"


def main() -> None:
    doc_tables.write_table(PAGE, COMPILER, compiler_line())
    for table in TABLES:
        doc_tables.write_table(PAGE, table, render_table(table))
    print(PAGE)


if __name__ == "__main__":
    main()
