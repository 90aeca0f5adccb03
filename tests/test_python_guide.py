"""The blocks of docs/guides/python.md run as printed, from top to bottom, on the bundled demo model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(page: str, namespace: dict[str, Any]) -> int:
    """Runs the Python blocks of a page in one namespace, with the page's line numbers; returns their number."""
    blocks = list(BLOCK.finditer(page))
    for block in blocks:
        lines_before = page.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), namespace)
    return len(blocks)


def test_every_block_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text("utf-8")
    assert run_blocks(page, {"__name__": "guide"}) == page.count("```python")
    output = capsys.readouterr().out
    for printed in (
        "enough for today",
        "the user closed the window",
        "the engine is making another video.",
        "MediaError: missing.png: there is no such file.",
    ):
        assert printed in output
    videos = {"circle", "two", "guided", "between", "corner", "blue", "long", "resumed", "teal", "half", "watched"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.mp4" for name in videos} | {"first.png"}


def test_failing_block_is_noticed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_blocks("# A page\n\n```python\nx = 1\n```\n\n```python\nx / 0\n```\n", {})
