"""Prompts from a file and from stdin: one per line, UTF-8, and every bad file is refused by name and line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.cli.prompts import MAX_PROMPT_BYTES, parse_prompt_lines
from tests.cli.conftest import CommandResult, FakeEngine
from tests.stdin_bytes import stdin_bytes

Run = Callable[..., CommandResult]
PROMPTS = b"# a comment\n\n  a red circle  \r\n\t\n \n a green square\n  # another\nthe last # line"
EXPECTED = ["a red circle", "a green square", "the last # line"]


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


def prompts_of(engine: FakeEngine) -> list[str]:
    return [request.prompt for request in engine.written_requests]


def test_each_line_of_a_file_is_a_prompt(kadr: Run, engine: FakeEngine) -> None:
    Path("prompts.txt").write_bytes(PROMPTS)
    result = kadr("generate", "--prompt-file", "prompts.txt")
    assert (result.code, result.out) == (0, "out.mp4\nout-2.mp4\nout-3.mp4\n"), result.err
    assert prompts_of(engine) == EXPECTED
    assert len(engine.open_calls) == 1


@pytest.mark.parametrize("args", [("-",), ("--prompt", "-"), ("--prompt=-",)])
def test_a_dash_reads_prompts_from_stdin(kadr: Run, engine: FakeEngine, args: tuple[str, ...]) -> None:
    with stdin_bytes(PROMPTS):
        result = kadr("generate", *args)
    assert result.code == 0, result.err
    assert prompts_of(engine) == EXPECTED
    assert "waiting" not in result.err


def test_a_dash_among_window_prompts_is_a_prompt(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", "--prompt", "-", "--prompt", "two").code == 0
    assert [request.prompts for request in engine.written_requests] == [("-", "two")]


def test_a_terminal_is_told_that_prompts_are_waited_for(
    kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Terminal(b"a red circle\n")))
    result = kadr("generate", "-")
    assert result.err.splitlines()[0].startswith("waiting for prompts on this terminal: one per line, Ctrl-")
    assert prompts_of(engine) == ["a red circle"]


def test_a_line_may_have_prompts_of_windows(kadr: Run, engine: FakeEngine) -> None:
    Path("prompts.txt").write_text("one | two\nthree\n")
    assert kadr("generate", "--prompt-file", "prompts.txt", "--window", "9", "--frames", "25").code == 0
    assert [request.prompts for request in engine.written_requests] == [("one", "two"), ("three",)]


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbfa fox\n", b"a fox", b"a fox\r\n", b"a fox\r", b"\n\n a fox \n\n", "a fox\u3000\n".encode()],
    ids=["BOM", "no newline", "CRLF", "CR", "spaces", "wide space"],
)
def test_prompt_is_the_line_without_what_surrounds_it(data: bytes) -> None:
    assert parse_prompt_lines(data, "x.txt") == ("a fox",)


def test_lines_end_at_newlines_alone() -> None:
    text = "a\x0bb\x0cc\u2028d\x85e\x1cf"
    assert parse_prompt_lines(text.encode(), "x.txt") == (text,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a fox\n# \xff\nb\n", "line 2 of prompts.txt is not UTF-8"),
        ("a fox".encode("utf-16"), "line 1 of prompts.txt is not UTF-8"),
        ("fox\nfox".encode("utf-16-le"), "line 1 of prompts.txt has a NUL character"),
        (b"", "prompts.txt has no prompts"),
        (b"# only\n\n  # comments\n", "prompts.txt has no prompts"),
        (b"\xef\xbb\xbf", "prompts.txt has no prompts"),
        (b"x" * (MAX_PROMPT_BYTES + 1), "prompts.txt has more than 1,000,000 bytes"),
    ],
    ids=["Latin-1", "UTF-16", "UTF-16-LE", "empty", "comments", "BOM", "large"],
)
def test_bad_prompts_are_refused_before_the_model_is_opened(
    kadr: Run, engine: FakeEngine, data: bytes, message: str
) -> None:
    Path("prompts.txt").write_bytes(data)
    for args, source in ((("--prompt-file", "prompts.txt"), "prompts.txt"), (("-",), "stdin")):
        with stdin_bytes(data):
            result = kadr("generate", *args)
        assert (result.code, result.out, engine.open_calls) == (1, "", [])
        assert result.err.splitlines()[-1].startswith(f"error: {message.replace('prompts.txt', source)}")
    assert os.listdir() == ["prompts.txt"]


@pytest.mark.parametrize("name", ["absent.txt", ".", "-", "x" * 300])
def test_file_that_cannot_be_read_is_named_with_the_way_out(kadr: Run, engine: FakeEngine, name: str) -> None:
    result = kadr("generate", "--prompt-file", name)
    assert (result.code, result.out, engine.open_calls) == (1, "", [])
    assert "cannot be read: " in result.err or "at most 255 bytes" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "say what to show, in quotes, or give --prompt-file FILE"),
        (("a fox", "--prompt-file", "prompts.txt"), "a prompt is given as 'a fox' too"),
        (("-", "--prompt-file", "prompts.txt"), "a prompt is given as '-' too"),
        (("--prompt", "a fox", "--prompt-file", "prompts.txt"), "a prompt is given as 'a fox' too"),
        (("", "--prompt-file", "prompts.txt"), "a prompt is given as '' too"),
    ],
)
def test_no_prompt_or_two_sources_are_bad_usage(
    kadr: Run, engine: FakeEngine, args: tuple[str, ...], message: str
) -> None:
    Path("prompts.txt").write_text("a fox\n")
    result = kadr("generate", *args)
    assert (result.code, result.out, engine.open_calls) == (2, "", [])
    assert message in result.err


@pytest.mark.parametrize("args", ["--frames 0", "--variations 0", "--enhance-model m", "--image absent.png"])
def test_flags_are_refused_before_prompts_are_read(
    kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, args: str
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    result = kadr("generate", "-", *args.split())
    assert result.code in (1, 2)
    assert "prompts" not in result.err
