"""Previews on a terminal: half blocks under the bars, which are gone at the end; a notice where there can be none."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from kadr.cli.terminal import preview, progress
from kadr.cli.terminal.preview import HALF_BLOCK, TerminalPreview, open_preview
from kadr.pipeline.progress import Progress
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
CONTROL = re.compile(r"\x1b\[(?:(\d+)A|2K|[\d;]*m|\?25[lh])|\r|\n|[^\x00-\x1f\x7f]")


class Terminal(io.TextIOWrapper):
    """A terminal that remembers what was written to it."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def use_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> Terminal:
    """Puts a terminal with 24-bit colours in the place of stderr."""
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return terminal


def lines_of(written: str) -> list[str]:
    """Returns the lines that a terminal shows after this was written; fails on a control code that has no place."""
    assert "".join(match[0] for match in CONTROL.finditer(written)) == written
    lines, row, column = [""], 0, 0
    for match in CONTROL.finditer(written):
        text = match[0]
        if text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text == "\r":
            column = 0
        elif text == "\x1b[2K":
            lines[row] = ""
        elif match[1]:
            row = max(0, row - int(match[1]))
        elif not text.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
    return lines


def frames_of(*colors: str, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Returns plain frames, uint8 (f, h, w, 3)."""
    return np.stack([np.broadcast_to(np.array(COLORS[color], np.uint8), (*size, 3)) for color in colors])


def render(shown: TerminalPreview, width: int = 80, height: int = 30) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width, height=height, no_color=False
    )
    console.print(shown, end="")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_half_block_has_the_colours_of_two_pixels() -> None:
    shown = TerminalPreview()
    shown.show(np.array([[[COLORS["red"]], [COLORS["blue"]]]], np.uint8))  # (1, 2, 1, 3)
    assert f"\x1b[38;2;255;0;0;48;2;0;0;255m{HALF_BLOCK}" in render(shown, width=1)


@pytest.mark.parametrize(
    "width, height, size, expected",
    [
        (80, 30, (120, 176), (46, 16)),  # 704x480 in 16 rows
        (20, 30, (120, 176), (20, 6)),  # a narrow terminal
        (80, 12, (120, 176), (11, 4)),  # a low one leaves room for the bars
        (80, 30, (176, 120), (21, 16)),  # vertical
        (80, 30, (8, 640), (80, 1)),
    ],
)
def test_preview_fits_the_terminal(width: int, height: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    shown = TerminalPreview()
    shown.show(frames_of("red", size=size))
    rows = lines_of(render(shown, width, height))[:-1]
    assert (len(rows[0]), len(rows)) == expected
    assert {len(row) for row in rows} == {expected[0]}


def test_tiny_terminal_shows_the_bars_alone() -> None:
    shown = TerminalPreview()
    shown.show(frames_of("red"))
    assert render(shown, height=8) == ""


def test_frames_follow_each_other_at_the_pace_of_the_video() -> None:
    now = 0.0
    shown = TerminalPreview(clock=lambda: now)
    shown.show(frames_of("red", "green", "blue"))
    images = []
    for _ in range(4):
        images.append(render(shown))
        now += 1 / preview.FRAMES_PER_SECOND
    assert len(set(images[:3])) == 3
    assert images[3] == images[0]


def test_newest_preview_replaces_the_one_before_and_is_removed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    shown, seen = open_preview(), []
    assert shown is not None
    with progress.show_progress(preview=shown) as watch:
        for step, color in enumerate(("red", "green"), 1):
            watch(Progress("denoise", step, 2, render_preview=lambda color=color: frames_of(color)))  # type: ignore[misc]
            watch(Progress("decode", 0, step))  # a new stage redraws
            seen.append(terminal.written)
        print("warning: from a library", file=sys.stderr)
    assert "255;0;0" in seen[0]
    assert "0;255;0" not in seen[0]
    assert "0;255;0" in seen[1]
    during, after = lines_of(seen[1]), lines_of(terminal.written)
    assert sum(HALF_BLOCK in line for line in during) == preview.MAX_PREVIEW_ROWS
    assert not any(HALF_BLOCK in line for line in after)
    assert "warning: from a library" in after
    assert [line.split()[0] for line in after if "━" in line] == ["denoising", "decoding", "decoding"]


def test_without_a_preview_there_are_only_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with progress.show_progress() as watch:
        watch(Progress("denoise", 1, 2, render_preview=lambda: pytest.fail("nobody wants it")))
    assert HALF_BLOCK not in terminal.written


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"TERM": "dumb"}, "COLORTERM"),
        ({"TERM": "xterm", "COLORTERM": ""}, "256 colours"),
        ({"NO_COLOR": "1"}, "256 colours"),
    ],
)
def test_terminal_without_colours_gets_a_notice(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    terminal = use_terminal(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert open_preview() is None
    assert terminal.written.startswith("there are no previews: ")
    assert reason in terminal.written


def test_terminal_without_half_blocks_gets_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch, "latin-1")
    assert open_preview() is None
    assert "UTF-8" in terminal.written


def test_terminal_with_256_colours_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.delenv("COLORTERM")  # as over ssh
    assert open_preview() is not None
    assert terminal.written == ""


def test_in_a_pipe_generate_says_that_there_is_no_preview(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("generate", "a red circle", "--preview", "--variations", "2")
    assert result.code == 0
    assert result.err.count("there are no previews: stderr is not a terminal") == 1
    assert engine.preview_flags == [False, False]


def test_engine_is_asked_for_previews_only_with_the_flag(
    kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_why_none", lambda: None)
    assert (kadr("generate", "a red circle").code, kadr("generate", "a red circle", "--preview").code) == (0, 0)
    assert engine.preview_flags == [False, True]
