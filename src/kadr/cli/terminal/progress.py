"""Progress on stderr: a bar per stage on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kadr.cli.terminal.errors import is_quiet, print_stderr
from kadr.cli.terminal.preview import FRAMES_PER_SECOND, TerminalPreview
from kadr.pipeline.display.progress_lines import STAGE_LABELS, stage_label, time_left, watch_in_lines
from kadr.pipeline.progress import Progress, StageProgress, Watch, ignore_progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


@contextmanager
def show_progress(position: tuple[int, int] | None = None, preview: TerminalPreview | None = None) -> Iterator[Watch]:
    """Yields a watcher that shows progress until the block ends.

    Args:
        position: of several videos, (number of this one, number of videos).
        preview: shows the preview of each step, on a terminal.
    """
    if is_quiet():
        yield ignore_progress
    elif sys.stderr.isatty():
        with _watch_in_bars(position, preview) as watch:
            yield watch
    else:
        yield watch_in_lines(print_stderr, position=position)


@contextmanager
def _watch_in_bars(position: tuple[int, int] | None, preview: TerminalPreview | None) -> Iterator[Watch]:
    # Imported here, because rich takes as long to load as all of `kadr --help`.
    from rich.progress import TaskID

    tasks: dict[str, TaskID] = {}
    with _create_bars(preview) as bars:

        def watch(progress: Progress) -> None:
            if progress.step == 0 or progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(STAGE_LABELS.get(progress.stage, progress.stage), left="")
            left, name = time_left(progress), stage_label(progress, position)
            bars.update(tasks[progress.stage], description=name, completed=progress.step, total=progress.of, left=left)
            if preview is not None and (frames := progress.preview) is not None:
                preview.show(frames)

        try:
            yield watch
        finally:
            if preview is not None:
                preview.show(None)  # the last redraw, when the bars are closed, removes it


def _create_bars(preview: TerminalPreview | None) -> Bars:
    """Returns bars of rich on stderr, with the previews below them."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    class BarsAndPreview(Bars):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            if preview is not None:
                yield preview

    name_column, time_column = TextColumn("{task.description:<19}"), TextColumn("{task.fields[left]}")
    return BarsAndPreview(
        *(name_column, BarColumn(), MofNCompleteColumn(), time_column),
        console=Console(stderr=True),
        redirect_stdout=False,
        refresh_per_second=10 if preview is None else FRAMES_PER_SECOND,
    )


def report_tensors(name: str, watch: Watch) -> Callable[[int, int], None]:
    """Returns a callback that reports counts of tensors, done and in all, as progress of a stage of this name."""
    stage: StageProgress | None = None

    def report(done: int, of: int) -> None:
        nonlocal stage
        if stage is None:
            stage = StageProgress(name, of, watch)
        else:
            stage.report(done)

    return report
