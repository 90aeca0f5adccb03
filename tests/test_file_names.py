"""A complete file takes its name, also where Windows refuses for a moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kadr import file_names
from kadr.file_names import is_allowed_name, replace_file


class OpenElsewhere:
    """`os.replace` while another program has the file open: refused a number of times."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.replace = refusals, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        if self.refusals:
            self.refusals -= 1
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        self.replace(source, target)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(file_names.time, "sleep", lambda seconds: None)


def test_file_that_is_open_for_moments_is_replaced_on_windows(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("new", "utf-8")
    old.write_text("old", "utf-8")
    monkeypatch.setattr(os, "replace", OpenElsewhere(len(file_names.REPLACE_PAUSES)))
    replace_file(new, old)
    assert old.read_text("utf-8") == "new"
    assert not new.exists()


def test_file_that_stays_open_is_refused(windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", OpenElsewhere(100))
    with pytest.raises(PermissionError, match="used by another process"):
        replace_file(tmp_path / "new", tmp_path / "old")


def test_other_systems_refuse_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "replace", OpenElsewhere(1))
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "new", tmp_path / "old")


def test_names_of_devices_are_not_allowed_on_windows(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ("nul.mp4", "CON", "Lpt1.mp4", "com¹.mp4", "a:b.mp4", "what?.mp4", "a|b", "dot.", "space ", "tab\t.mp4")
    assert [name for name in refused if is_allowed_name(name)] == []
    assert all(map(is_allowed_name, ("out.mp4", "null.mp4", "console.mp4", "кадр 1.mp4", ".kadr-0f.part.mp4")))
    monkeypatch.setattr(sys, "platform", "linux")
    assert all(map(is_allowed_name, refused))
