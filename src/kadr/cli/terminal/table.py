"""Tables as plain text, the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kadr.quoting import show

MAX_CELL = 500  # characters; a longer value is in the output of --json


def format_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligns rows of equal length to the left, two spaces apart. Cells are escaped and cut to `MAX_CELL` characters."""
    rows = [[show(cell, MAX_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def format_si(number: int) -> str:
    """Formats a number as 6.34 G or 420 M: three digits, powers of ten."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
