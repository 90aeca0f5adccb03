"""How far it is, on stderr: a bar per stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kadr.cli.terminal.errors import say
from kadr.pipeline.progress import Progress, Watch

EVERY = 5.0  # seconds between two lines where there is no terminal
NAMES = {
    "text": "reading the prompt",
    "control": "making controls",
    "encode": "looking at pictures",
    "train": "training",
    "denoise": "denoising",
    "upscale": "upscaling",
    "refine": "refining",
    "decode": "decoding",
}


@contextmanager
def shown() -> Iterator[Watch]:
    """A watcher that shows what it sees until the block ends."""
    if sys.stderr.isatty():
        with _bars() as watch:
            yield watch
    else:
        yield lines()


def lines(clock: Callable[[], float] = time.monotonic) -> Watch:
    """Watch in plain lines: at the end of every stage, and every few seconds."""
    last = clock()

    def watch(progress: Progress) -> None:
        nonlocal last
        if 0 < progress.step == progress.of or clock() - last >= EVERY:
            last = clock()
            say(f"{_name(progress)}: {progress.step} of {progress.of}{_left(progress, ', ')}")

    return watch


@contextmanager
def _bars() -> Iterator[Watch]:
    # Here, because rich takes as long to load as all of `kadr --help`.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<19}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:

        def watch(progress: Progress) -> None:
            if progress.step == 0 or progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(NAMES.get(progress.stage, progress.stage), left="")
            left, name = _left(progress), _name(progress)
            bars.update(tasks[progress.stage], description=name, completed=progress.step, total=progress.of, left=left)

        yield watch


def _name(progress: Progress) -> str:
    name = NAMES.get(progress.stage, progress.stage)
    return name if progress.window is None else "{}, window {} of {}".format(name, *progress.window)


def _left(progress: Progress, before: str = "") -> str:
    """How long the stage still takes, where that is known and not over."""
    known = progress.eta is not None and progress.step < progress.of
    return f"{before}{duration(progress.eta or 0)} left" if known else ""


def duration(seconds: float) -> str:
    """Such as 0:07 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
