"""Where kadr owns the process, torch's GPU memory grows in place, unless the user has set the allocator."""

from __future__ import annotations

import platform
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kadr.cli import main
from kadr.jobs import worker
from kadr.memory import allocator
from kadr.memory.allocator import OLDER_VARIABLES, SETTING, VARIABLE, use_expandable_segments


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, *OLDER_VARIABLES):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


def test_segments_are_expandable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_expandable_segments()
    assert allocator.os.environ[VARIABLE] == SETTING


@pytest.mark.parametrize("name", [VARIABLE, *OLDER_VARIABLES])
def test_what_the_user_sets_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not use_expandable_segments()
    assert allocator.os.environ[name] == "expandable_segments:False"
    assert sum(variable in allocator.os.environ for variable in (VARIABLE, *OLDER_VARIABLES)) == 1


@pytest.mark.parametrize(("system", "release"), [("win32", "10"), ("darwin", "24"), ("linux", "5.15-microsoft-WSL2")])
def test_systems_without_such_segments_are_left_alone(
    system: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert not use_expandable_segments()
    assert VARIABLE not in allocator.os.environ


def test_the_command_line_sets_it_before_any_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "tune_malloc", lambda: None)  # of this process, which is pytest's
    with pytest.raises(SystemExit):
        main.run(["--version"])
    assert allocator.os.environ[VARIABLE] == SETTING


def test_a_worker_sets_it_before_it_opens_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def create_maker() -> Any:
        assert allocator.os.environ[VARIABLE] == SETTING
        raise Stop

    for name in ("signal.signal", "_wake_when_parent_dies", "tune_malloc", "Thread"):
        monkeypatch.setattr(f"kadr.jobs.worker.{name}", lambda *args, **kwargs: SimpleNamespace(start=lambda: None))
    with pytest.raises(Stop):
        worker.run_worker(None, create_maker)  # type: ignore[arg-type]
