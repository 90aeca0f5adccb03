"""Figures in words, for a terminal and for a page. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REPORT_COLUMNS = (
    "",
    "numbers",
    "time",
    "spread",
    "time / kadr's",
    "TFLOP/s",
    "of matmul",
    "memory",
    "weights",
    "error",
)
Case = Mapping[str, Any]


def case_title(case: Case) -> str:
    """Such as "2b, 4 of 28 layers, 512x320x25: dit"."""
    layers = "" if case["layers"] is None else ", {} of {} layers".format(*case["layers"])
    schedule = f", {case['schedule']}" if case["schedule"] else ""
    return f"{case['model']}{layers}, {case['size']}: {case['stage']}{schedule}"


def contender_row(contender: Mapping[str, Any]) -> tuple[str, ...]:
    """One contender under `COLUMNS`."""
    share, rate = contender["share_of_matmul"], contender["flops_per_second"]
    return (
        contender["name"],
        contender["dtype"],
        format_seconds(contender["median"]),
        format_seconds(contender["spread"]),
        f"{contender['ratio']:.2f}",
        "" if rate is None else f"{rate / 1e12:.3g}",
        "" if share is None else f"{100 * share:.0f} %",
        format_bytes(contender["peak"]),
        format_bytes(contender["weights"]),
        format_error(contender["error"]),
    )


def case_notes(case: Case) -> list[str]:
    """Who did not run, and why; and what was not compared."""
    told = [f"{each['name']}: {each['reason']}" for each in case["absent"]]
    told += [f"{each['name']}: {each['note']}" for each in case["contenders"] if each["note"]]
    return told + ([case["compared"]] if case["compared"].startswith("not ") else [])


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    sets = " ".join(machine["instructions"])
    return f"{where} ({sets}); torch {machine['torch']}, kadr {machine['kadr']} at {machine['revision'] or 'no commit'}"


def format_error(value: float | None) -> str:
    """Two digits; 0 where every bit is the same."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def format_seconds(value: float) -> str:
    """Three digits."""
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def format_bytes(value: int | None) -> str:
    """Bytes, in MB or GB."""
    if value is None:
        return ""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def matmul_rate(case: Case) -> str:
    """What the machine did with matrices meanwhile."""
    rates = {each["dtype"]: each["matmul_per_second"] for each in case["contenders"] if each["matmul_per_second"]}
    return ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in rates.items())


def report_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """All of it as plain text."""
    yield machine_line(result["machine"])
    for case in result["cases"]:
        yield ""
        told = matmul_rate(case)
        yield case_title(case) + (f"  (matmul: {told})" if told else "")
        yield from align_columns([REPORT_COLUMNS, *(contender_row(each) for each in case["contenders"])])
        yield from case_notes(case)


def align_columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns two spaces apart; those that are empty are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()
