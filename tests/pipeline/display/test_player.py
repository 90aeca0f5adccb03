"""`show()` outside of a notebook: the system's player gets the file, or an error says why there is none."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kadr import KadrError, MediaError, Request, Size, Video, VideoFile
from kadr.media.clip import read_video
from kadr.pipeline.display import player

REQUEST = Request("a red circle", seed=3)


def make_video(height: int = 32) -> Video:
    frames = np.full((2, height, 64, 3), 200, np.uint8)
    return Video(frames, torch.zeros(128, 1, 1, 2), 24.0, REQUEST, {})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that open files, on a system with a screen; temporary files are below `tmp_path`."""
    commands: list[list[str]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(player.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    return commands


@pytest.mark.parametrize("platform, opener", [("linux", "xdg-open"), ("darwin", "open"), ("freebsd14", "xdg-open")])
def test_show_opens_a_temporary_file(
    monkeypatch: pytest.MonkeyPatch, opened: list[list[str]], platform: str, opener: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    make_video().show()
    ((program, path),) = opened
    assert program == f"/usr/bin/{opener}"
    assert len(read_video(path).frames) == 2


def test_show_on_windows_lets_the_system_open_the_file(
    monkeypatch: pytest.MonkeyPatch, opened: list[list[str]]
) -> None:
    files: list[Path] = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(player.os, "startfile", files.append, raising=False)
    make_video().show()
    assert (files[0].suffix, files[0].is_file(), opened) == (".mp4", True, [])


def test_show_of_a_file_opens_that(opened: list[list[str]], tmp_path: Path) -> None:
    path = make_video().save(tmp_path / "clip.mp4")
    VideoFile(path, 2, Size(64, 32), 24.0, 1.0, torch.zeros(1), REQUEST).show()
    assert opened == [["/usr/bin/xdg-open", str(path)]]


@pytest.mark.parametrize("cause", ["screen", "program"])
def test_without_a_player_the_error_says_what_to_do_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, opened: list[list[str]], tmp_path: Path, cause: str
) -> None:
    if cause == "screen":
        monkeypatch.delenv("DISPLAY")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    else:
        monkeypatch.setattr(player.shutil, "which", lambda name: None)
    with pytest.raises(KadrError, match=r"(DISPLAY|xdg-open).*video\.save\(path\)"):
        make_video().show()
    assert list(tmp_path.iterdir()) == []


def test_video_that_cannot_be_written_leaves_no_folder(opened: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="even"):
        make_video(height=31).show()
    assert (opened, list(tmp_path.iterdir())) == ([], [])


def test_player_that_does_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch, opened: list[list[str]], tmp_path: Path
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(KadrError, match="Permission denied"):
        make_video().show()
    assert list(tmp_path.iterdir()) == []
