"""Figures in words, for a terminal and for a page. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEAD = ("", "numbers", "time", "spread", "time / kadr's", "TFLOP/s", "of matmul", "memory", "weights", "error")
Case = Mapping[str, Any]


def title(case: Case) -> str:
    """Such as "2b, 4 of 28 layers, 512x320x25: dit"."""
    layers = "" if case["layers"] is None else ", {} of {} layers".format(*case["layers"])
    schedule = f", {case['schedule']}" if case["schedule"] else ""
    return f"{case['model']}{layers}, {case['size']}: {case['stage']}{schedule}"


def row(figure: Mapping[str, Any]) -> tuple[str, ...]:
    """One contender under `HEAD`."""
    share, rate = figure["share_of_matmul"], figure["flops_per_second"]
    return (
        figure["name"],
        figure["dtype"],
        seconds(figure["median"]),
        seconds(figure["spread"]),
        f"{figure['ratio']:.2f}",
        "" if rate is None else f"{rate / 1e12:.3g}",
        "" if share is None else f"{100 * share:.0f} %",
        size(figure["peak"]),
        size(figure["weights"]),
        error(figure["error"]),
    )


def absences(case: Case) -> list[str]:
    """Who did not run, and why; and what was not compared."""
    told = [f"{each['name']}: {each['reason']}" for each in case["absent"]]
    told += [f"{each['name']}: {each['note']}" for each in case["contenders"] if each["note"]]
    return told + ([case["compared"]] if case["compared"].startswith("not ") else [])


def about(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    sets = " ".join(machine["instructions"])
    return f"{where} ({sets}); torch {machine['torch']}, kadr {machine['kadr']} at {machine['revision'] or 'no commit'}"


def error(value: float | None) -> str:
    """Two digits; 0 where every bit is the same."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def seconds(value: float) -> str:
    """Three digits."""
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def size(value: int | None) -> str:
    """Bytes, in MB or GB."""
    if value is None:
        return ""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def rate(case: Case) -> str:
    """What the machine did with matrices meanwhile."""
    rates = {each["dtype"]: each["matmul_per_second"] for each in case["contenders"] if each["matmul_per_second"]}
    return ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in rates.items())


def lines(made: Mapping[str, Any]) -> Iterator[str]:
    """All of it as plain text."""
    yield about(made["machine"])
    for case in made["cases"]:
        yield ""
        told = rate(case)
        yield title(case) + (f"  (matmul: {told})" if told else "")
        yield from aligned([HEAD, *(row(each) for each in case["contenders"])])
        yield from absences(case)


def aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns two spaces apart; those that are empty are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()
