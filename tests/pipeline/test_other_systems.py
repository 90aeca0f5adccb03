"""A video is made without what only Linux, or only POSIX, has; the system is faked, none but Linux was there."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kadr import Engine, Request
from kadr.bench.machine import describe_machine
from kadr.bench.peak_memory import host_peak_bytes
from kadr.cli.terminal.signals import handle_signals
from kadr.errors import MediaError
from kadr.kernels.cpu import malloc
from kadr.media.clip import read_metadata, read_video
from kadr.memory import cgroup, device, mapped_files
from kadr.memory.cpu import cpu_model
from kadr.pipeline.longvideo import folder_lock
from kadr.planning.calibration.rates import RateMeter

CPU = torch.device("cpu")
REQUEST = Request(prompt="a red circle", size=(64, 32), frames=9, fps=24, seed=7, steps=2, guidance=1.0)
MISSING: dict[str, list[tuple[Any, str]]] = {
    "win32": [
        *((os, name) for name in ("posix_fadvise", "POSIX_FADV_DONTNEED", "getloadavg", "fork", "mkfifo", "getuid")),
        *((mmap, name) for name in ("MADV_DONTNEED", "MADV_WILLNEED", "MAP_PRIVATE", "PROT_READ", "PROT_WRITE")),
        (signal, "SIGHUP"),
    ],
    "darwin": [(os, "posix_fadvise"), (os, "POSIX_FADV_DONTNEED")],
}


other_systems = pytest.mark.parametrize("system", MISSING)


def pretend(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what a system lacks: names of modules, glibc, /proc and /sys."""
    path_open = Path.open

    def open_without_proc(path: Path, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return path_open(path, *args, **kwargs)

    def refuse_libc(name: str | None, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("bad argument type for built-in operation")  # as on Windows, for None

    malloc._mallopt.cache_clear()
    device._libc.cache_clear()
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", refuse_libc)
    monkeypatch.setattr(Path, "open", open_without_proc)
    monkeypatch.setattr(malloc._Process, "is_tuned", False)
    for module, name in MISSING[system]:
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(mapped_files, "_maps", type(mapped_files._maps)())  # files are mapped anew


@pytest.fixture(autouse=True)
def forget_libc() -> Any:
    yield
    malloc._mallopt.cache_clear()
    device._libc.cache_clear()


@other_systems
def test_video_is_the_same_without_what_other_systems_lack(
    system: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(REQUEST).frames
    pretend(system, monkeypatch)
    assert not malloc.tune_malloc()
    with handle_signals():
        engine.write(REQUEST, tmp_path / "out.mp4")
        frames = engine.generate(REQUEST).frames
    assert (frames == expected).all()
    assert len(read_video(tmp_path / "out.mp4").frames) == 9
    assert read_metadata(tmp_path / "out.mp4")["request"]["seed"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@other_systems
def test_measurements_leave_out_what_the_system_does_not_tell(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(system, monkeypatch)
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert mapped_files.cached_fraction(tmp_path / "file") == 1.0
    assert cgroup.free_memory_bytes() == cgroup.cpu_share() == sys.maxsize
    assert cpu_model() == ""
    assert host_peak_bytes(lambda: None) is None
    assert RateMeter(torch.float32, CPU)._touch_uncached(tmp_path / "file", torch.zeros(1)) is None
    assert (describe_machine(CPU)["load"] is None) == (system == "win32")


def test_lock_that_cannot_be_deleted_while_held_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows does not delete an open file: filelock deletes its lock itself, once it is released."""
    folder, unlink, release = tmp_path / "a.windows", Path.unlink, folder_lock.FileLock.release

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "The process cannot access the file")

    def release_as_on_windows(lock: Any, *args: Any) -> None:
        release(lock, *args)
        unlink(folder / folder_lock.LOCK_FILE, missing_ok=True)

    monkeypatch.setattr(folder_lock.FileLock, "release", release_as_on_windows)
    with folder_lock.lock_folder(folder):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refuse)
            folder_lock.remove_lock(folder)
        assert folder.is_dir()
    assert not folder.exists()


def test_video_whose_name_is_taken_by_an_open_file_is_kept(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, replace = tmp_path / "out.mp4", os.replace
    output.write_bytes(b"played by another program")

    def refuse_output(source: Path, target: Path) -> None:
        if Path(target) == output:
            raise PermissionError(13, "The process cannot access the file")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_output)
    with pytest.raises(MediaError, match=r"another program may have it open\. The video is complete, as") as caught:
        engine.write(REQUEST, output)
    (kept,) = set(tmp_path.iterdir()) - {output}
    assert str(kept) in str(caught.value)
    assert len(read_video(kept).frames) == 9
    assert output.read_bytes() == b"played by another program"


def test_device_name_as_output_is_refused_on_windows(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(MediaError, match=r"no file named nul\.mp4"):
        engine.write(REQUEST, tmp_path / "nul.mp4")
