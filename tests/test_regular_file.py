"""Only regular files are opened, and small ones read: a pipe would block for ever, a device may never end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kadr.regular_file import (
    FileTooLargeError,
    NotRegularFileError,
    open_regular,
    read_bytes,
    read_text,
    require_regular,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


@pytest.mark.parametrize("read", [require_regular, open_regular, read_text])
def test_a_named_pipe_is_refused_without_being_opened(read: object, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(NotRegularFileError, match=r"^it is a named pipe, and only regular files are read$"):
            read(tmp_path / name)  # type: ignore[operator]


def test_devices_and_sockets_are_refused_by_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotRegularFileError, match="it is a device"):
        read_text("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket is at most about 100 bytes long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("listener")
        with pytest.raises(NotRegularFileError, match="it is a socket"):
            open_regular(Path("listener"))


def test_regular_files_are_read_and_missing_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("кадр", "utf-8")
    assert read_text(tmp_path / "text") == "кадр"
    with open_regular(tmp_path / "text") as file:
        assert file.read() == "кадр".encode()
    require_regular(tmp_path)  # a folder is read by its own rules
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent")


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    for read in (read_bytes, read_text):
        with pytest.raises(FileTooLargeError, match=r"^it has more than 8,000,000 bytes, too many for such a file$"):
            read(tmp_path / "large")
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bytes(tmp_path / "small", 5) == b"12345"
    with pytest.raises(FileTooLargeError, match="more than 4 bytes"):
        read_bytes(tmp_path / "small", 4)
