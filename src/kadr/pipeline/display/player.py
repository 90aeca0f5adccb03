"""The system's player: the program that it opens a video with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from kadr.errors import KadrError

_WITHOUT_PLAYER = "Save the video, video.save(path), and open the file where there is one; or show it in a notebook."


def find_opener() -> str | None:
    """Returns the program that opens files as a double click does; None on Windows, where the system itself does.

    Raises:
        KadrError: there is none, or no screen to show anything on.
    """
    if sys.platform == "win32":
        return None
    is_mac = sys.platform == "darwin"
    if not is_mac and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise KadrError(f"there is no screen: neither DISPLAY nor WAYLAND_DISPLAY is set. {_WITHOUT_PLAYER}")
    opener = shutil.which("open" if is_mac else "xdg-open")
    if opener is None:
        raise KadrError(
            f"{'open' if is_mac else 'xdg-open'} is not installed, which finds the player. {_WITHOUT_PLAYER}"
        )
    return opener


def play(path: Path) -> None:
    """Opens a video in the system's player, and does not wait for it.

    Raises:
        KadrError: there is no player, or no screen.
    """
    opener = find_opener()
    try:
        if opener is None:
            os.startfile(path.absolute())  # type: ignore[attr-defined]
        else:
            null = subprocess.DEVNULL
            command = [opener, str(path.absolute())]
            subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError as error:
        raise KadrError(f"{path} cannot be played: {error.strerror or error}. {_WITHOUT_PLAYER}") from error
