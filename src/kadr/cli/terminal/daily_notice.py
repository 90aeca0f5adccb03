"""Notices that are printed once a day: whoever has read one knows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import date

from kadr.cache_home import cache_home
from kadr.cli.terminal.errors import print_stderr
from kadr.regular_file import read_text

NOTICES_FOLDER = "notices"  # in the folder of caches: a file for each notice, with the day on which it was printed last


def print_daily(name: str, text: str, *, today: Callable[[], date] = date.today) -> None:
    """Prints a notice to stderr, unless it was printed today. Where the day cannot be stored, it is printed each time.

    Args:
        name: of the file that stores the day.
    """
    day = today().isoformat()
    with suppress(OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: this user has no home directory
        if read_text(cache_home() / NOTICES_FOLDER / name).strip() == day:
            return
    print_stderr(text)
    with suppress(OSError, RuntimeError):
        file = cache_home() / NOTICES_FOLDER / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{day}\n", "utf-8")
