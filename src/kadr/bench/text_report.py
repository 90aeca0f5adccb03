"""Formats benchmark results for a terminal and for documents. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kadr.bench.cases import TEXT

REPORT_COLUMNS = (
    "",
    "dtype",
    "time",
    "IQR",
    "time / kadr's",
    "TFLOP/s",
    "of matmul",
    "of peak",
    "memory",
    "weights",
    "error",
)
Case = Mapping[str, Any]


def case_title(case: Case) -> str:
    """Returns a title such as "2b, 4 of 28 blocks, 512x320x25: dit", or "2b, 100 prompt tokens: text"."""
    blocks = "" if case["blocks"] is None else ", {} of {} blocks".format(*case["blocks"])
    schedule = f", {case['schedule']}" if case["schedule"] else ""
    has_prompt = case["stage"] == TEXT and "prompt_tokens" in case
    size = f"{case['prompt_tokens']} prompt tokens" if has_prompt else case["size"]
    return f"{case['model']}{blocks}, {size}: {case['stage']}{schedule}"


def contender_row(contender: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the cells of one contender, under `REPORT_COLUMNS`."""
    rate = contender["flops_per_second"]
    return (
        contender["name"],
        contender["dtype"],
        format_seconds(contender["median"]),
        format_seconds(contender["interquartile_range"]),
        f"{contender['ratio']:.2f}",
        "" if rate is None else f"{rate / 1e12:.3g}",
        _format_share(contender["share_of_matmul"]),
        _format_share(contender.get("share_of_peak")),
        format_bytes(contender["peak_bytes"]),
        format_bytes(contender["weight_bytes"]),
        format_error(contender["error"]),
    )


def _format_share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def case_notes(case: Case) -> list[str]:
    """Returns a line for each skipped contender, for each note, and for a missing reference."""
    notes = [f"{each['name']}: {each['reason']}" for each in case["skipped"]]
    notes += [f"{each['name']}: {each['note']}" for each in case["contenders"] if each["note"]]
    notes += case.get("notes", [])
    return notes + ([case["reference"]] if case["reference"].startswith("not ") else [])


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describes the machine in a line."""
    processor = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    sets = " ".join(machine["instruction_sets"])
    versions = f"torch {machine['torch']}, kadr {machine['kadr']} at {machine['revision'] or 'no commit'}"
    return f"{processor} ({sets}); {versions}"


def format_error(value: float | None) -> str:
    """Formats an error with two digits; 0 where every bit is equal."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def format_seconds(value: float) -> str:
    """Formats a duration with three digits."""
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def format_bytes(value: int | None) -> str:
    """Formats bytes in MB or GB."""
    if value is None:
        return ""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def yardstick_rates(case: Case) -> str:
    """Returns " (matmul: float32 0.4 TFLOP/s; peak: float32 0.5)", of the same rounds; "" where there are none."""
    matmul, peak = (_rates_by_dtype(case, name) for name in ("matmul_per_second", "peak_per_second"))
    texts = [f"{name}: {rates}" for name, rates in (("matmul", matmul), ("peak", peak)) if rates]
    return f" ({'; '.join(texts)})" if texts else ""


def _rates_by_dtype(case: Case, name: str) -> str:
    rates = {each.get("products", each["dtype"]): each.get(name) for each in case["contenders"] if each.get(name)}
    return ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in rates.items())


def report_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields the whole result as plain text."""
    yield machine_line(result["machine"])
    for case in result["cases"]:
        yield ""
        yield case_title(case) + yardstick_rates(case)
        yield from align_columns([REPORT_COLUMNS, *(contender_row(each) for each in case["contenders"])])
        yield from case_notes(case)


def align_columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Aligns columns two spaces apart, and drops the empty ones."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()
