"""Lines of a text file as prompts: one per line, but for empty lines and comments."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import NamedTuple

COMMENT = "#"


class PromptLine(NamedTuple):
    """A line that is a prompt, or cannot be one.

    Args:
        number: of the line, from 1.
        prompt: without spaces around it; "" where there is a problem.
        problem: the reason why it is no prompt, as the predicate of a sentence; None where it is one.
    """

    number: int
    prompt: str
    problem: str | None = None


def iterate_prompt_lines(data: bytes) -> Iterator[PromptLine]:
    """Yields the lines of a text that are not empty and do not begin with #.

    Args:
        data: UTF-8, with or without a byte order mark.
    """
    for number, line in iterate_lines(data):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            yield PromptLine(number, "", "is not UTF-8")
            continue
        if "\0" in text:
            yield PromptLine(number, "", "has a NUL character")
        elif text and not text.startswith(COMMENT):
            yield PromptLine(number, text)


def iterate_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a text with their numbers, from 1, without a byte order mark and line ends."""
    return enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1)
