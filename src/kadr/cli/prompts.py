"""Prompts of a command: its argument, or the lines of a file or of stdin."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from kadr.cli.terminal.errors import print_stderr
from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.regular_file import open_regular
from kadr.text.prompt_lines import COMMENT, iterate_prompt_lines
from kadr.validation import check_path, expand_home

STDIN = "-"  # as PROMPT: its lines are the prompts
MAX_PROMPT_BYTES = 1_000_000  # of all prompts; a larger file is something else
_END_KEYS = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"


def check_prompt_source(prompt: str | None, prompt_file: Path | None) -> None:
    """Refuses a command with no prompt, or with a prompt and a file of prompts.

    Raises:
        BadParameter: names the ways out.
    """
    if prompt is None and prompt_file is None:
        raise typer.BadParameter("say what to show, in quotes, or give --prompt-file FILE.", param_hint="PROMPT")
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter(
            f"a prompt is given as {quote(prompt)} too; give only one of the two.", param_hint="--prompt-file"
        )


def read_prompt_lines(prompt_file: Path | None) -> tuple[str, ...]:
    """Reads the prompts of a file, or of stdin where it is None; see `parse_prompt_lines`.

    Raises:
        RequestError: it cannot be read, is no regular file, or is too large.
    """
    source = "stdin" if prompt_file is None else str(prompt_file)
    try:
        data = _read_stdin() if prompt_file is None else _read_file(prompt_file)
    except OSError as error:
        raise RequestError(
            f"the prompts in {source} cannot be read: {error.strerror or error}. Name a text file with one prompt per "
            f"line, or give {STDIN} as PROMPT and the prompts on stdin."
        ) from error
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(
            f"{source} has more than {MAX_PROMPT_BYTES:,} bytes, too many for prompts. Give one prompt per line, in "
            "several commands if need be."
        )
    return parse_prompt_lines(data, source)


def _read_file(path: Path) -> bytes:
    check_path("the prompt file", path)
    with open_regular(expand_home(path)) as file:
        return file.read(MAX_PROMPT_BYTES + 1)


def _read_stdin() -> bytes:
    if sys.stdin.isatty():
        print_stderr(f"waiting for prompts on this terminal: one per line, {_END_KEYS} after the last")
    return sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)


def parse_prompt_lines(data: bytes, source: str) -> tuple[str, ...]:
    """Returns the prompts of a text: each line is one, but for empty lines and comments, which begin with #.

    Spaces around a prompt do not count. A prompt cannot go over several lines.

    Args:
        data: UTF-8, with or without a byte order mark.
        source: its name, for errors.

    Raises:
        RequestError: a line is not text, or none is a prompt.
    """
    prompts: list[str] = []
    for line in iterate_prompt_lines(data):
        if line.problem is not None:
            raise RequestError(f"line {line.number} of {source} {line.problem}. Save the prompts as UTF-8 text.")
        prompts.append(line.prompt)
    if not prompts:
        raise RequestError(
            f"{source} has no prompts: it is empty, or every line is empty or begins with {COMMENT}. Write one prompt "
            "per line."
        )
    return tuple(prompts)
