"""Results on stdout. Foreign text in tables is escaped and cut; JSON has all of it, escaped as JSON does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from kadr.cli.terminal.errors import print_stdout, writing_stdout
from kadr.quoting import escape, show

MAX_OUTPUT_LINE = 1000  # characters; a longer value is in the output of --json


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines of a description, each escaped and cut to `MAX_OUTPUT_LINE` characters."""
    print_stdout("\n".join(show(line, MAX_OUTPUT_LINE) for line in lines))


def print_path(path: str | Path, *, outcome: str = "") -> None:
    """Prints the path of a result: escaped on a terminal, byte for byte into a pipe or a file.

    Args:
        outcome: see `print_stdout`, as for the errors.
    """
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        print_stdout(escape(str(path)), outcome=outcome)
        return
    with writing_stdout(outcome):
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
        sys.stdout.flush()
