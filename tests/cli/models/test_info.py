"""`kadr models info`: description, files, licence, recipe and words; and the demo's notice comes once a day."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from kadr.cli.commands.generate import DEMO_NOTICE
from kadr.cli.terminal.daily_notice import print_daily
from kadr.models.registry import DEFAULT_NEGATIVE_PROMPT, RELEASES, find_release, required_releases
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
PROMPT = "a red circle moving right on a black background"


def test_info_of_the_demo_lists_its_words(kadr: Run) -> None:
    result = kadr("models", "info", "demo")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("demo: a small model that comes with kadr")
    for kind, words in find_release("demo").words.items():
        assert any(line.split("  ")[1:2] == [kind] and line.endswith(", ".join(words)) for line in lines)
    assert "  single pass: 24 steps; guidance 3" in lines
    assert "recipe: 128x128, 25 frames at 24 per second" in lines


@pytest.mark.parametrize("name", [release.name for release in RELEASES])
def test_info_tells_of_every_release_what_the_registry_knows(kadr: Run, name: str) -> None:
    release = find_release(name)
    text = kadr("models", "info", name).out
    assert text.startswith(f"{name}: {release.description}\nlicence: {release.licence}\nsource: ")
    data = json.loads(kadr("models", "info", name, "--json").out)
    assert [file["name"] for file in data["files"]] == [needed.name for needed in required_releases(release)]
    assert data["files"][0]["file"] == release.file
    assert (data["files"][0]["on_disk"] is not None) == (release.repo is None)
    assert data["files"][0]["bytes"]
    assert (data["recipe"] is None) == (release.kind != "model")
    assert all(file["file"] in text for file in data["files"])
    assert len(release.description) > 20


def test_info_of_a_model_of_two_passes_has_both(kadr: Run) -> None:
    lines = kadr("models", "info", "ltxv-13b-0.9.8-dev").out.splitlines()
    assert "  second pass: 30 steps less the 17 first; guidance 1; STG 1" in lines
    first_pass = next(line for line in lines if line.startswith("  first pass: "))
    assert "30 steps less the 3 last; guidance 1, 1, 6, 8, 6, 1, 1; STG 0, 0, 4, 4, 4, 2, 1" in first_pass
    assert f"  negative prompt: {DEFAULT_NEGATIVE_PROMPT}" in lines
    assert any(line.startswith("t5-v1.1-xxl") and " no " in line for line in lines)


def test_the_notice_of_the_demo_comes_once_a_day(
    kadr: Run, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "cache"))
    counts = [kadr("generate", PROMPT).err.count(DEMO_NOTICE) for _ in range(3)]
    assert counts == [1, 0, 0]


def test_a_daily_notice_comes_again_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path))
    for day in (1, 1, 2, 2, 1):  # a clock may be set back
        print_daily("name", f"day {day}", today=lambda day=day: date(2026, 11, day))  # type: ignore[misc]
    print_daily("other", "other", today=lambda: date(2026, 11, 1))
    assert capsys.readouterr().err.splitlines() == ["day 1", "day 2", "day 1", "other"]


def test_a_notice_is_printed_where_its_day_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        print_daily("name", "text")
    assert capsys.readouterr().err.splitlines() == ["text", "text"]
