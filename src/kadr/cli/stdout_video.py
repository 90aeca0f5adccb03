"""`--output -`: the finished video goes to stdout, and nothing else does."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from kadr.cli.terminal.errors import writing_stdout

STDOUT = Path("-")


@contextmanager
def hidden_video() -> Iterator[Path]:
    """Yields the path of an mp4 in a temporary folder, which is removed afterwards."""
    with TemporaryDirectory(prefix="kadr-") as folder:
        yield Path(folder) / "video.mp4"


def check_stdout(*, number_of_videos: int = 1, resume: bool = False, as_json: bool = False) -> None:
    """Refuses what cannot go together with a video on stdout.

    Raises:
        BadParameter: stdout is a terminal, or is for something else.
    """
    reason = ""
    if sys.stdout.isatty():
        reason = "stdout is a terminal, and a video is not text. Send it on: kadr generate ... --output - | ffplay -"
    elif number_of_videos > 1:
        reason = f"stdout takes one video, and this command makes {number_of_videos}. Name a file."
    elif as_json:
        reason = "stdout is for the video, and --json would print to it as well. Leave one out."
    elif resume:
        reason = "windows are kept beside a file, and stdout is none. Name the file to resume."
    if reason:
        raise typer.BadParameter(reason, param_hint="--output")


def copy_to_stdout(path: Path) -> None:
    """Writes a finished video to stdout.

    Raises:
        KadrError: stdout cannot be written, as on a full disk.
        BrokenPipeError: whoever read stdout has closed it.
    """
    with writing_stdout("the video is made, but could not be sent on:"), path.open("rb") as video:
        sys.stdout.flush()
        shutil.copyfileobj(video, sys.stdout.buffer)
        sys.stdout.buffer.flush()
