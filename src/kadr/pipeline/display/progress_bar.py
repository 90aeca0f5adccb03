"""A progress bar for notebooks, with the newest preview; lines on stderr elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kadr.media.webp import encode_webp
from kadr.notebook.html import data_url, element, table_of_html, text
from kadr.notebook.kernel import notebook_display
from kadr.pipeline.display.progress_lines import describe_progress, stage_label, time_left, watch_in_lines
from kadr.pipeline.progress import Progress, Watch

if TYPE_CHECKING:
    import numpy as np

SECONDS_BETWEEN_UPDATES = 0.25
LOOP_SECONDS = 3.0  # that the frames of a preview take, over and over


class ProgressBar:
    """A watcher that shows progress; pass it as `watch`, with `preview=True` for previews too.

        video = engine.generate(request, watch=kadr.ProgressBar(), preview=True)

    In a notebook a bar for each stage is the output of the cell, and changes in place. Elsewhere it prints a line to
    stderr at the end of every stage, and every few seconds. It may be used for one video after another.

    Args:
        clock: seconds, for the pace of updates.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._display = notebook_display()
        self._watch_in_lines: Watch = watch_in_lines(lambda line: print(line, file=sys.stderr), clock)
        self._begin()

    def _begin(self) -> None:
        self._stages: dict[str, Progress] = {}
        self._preview: np.ndarray | None = None
        self._handle: Any = None
        self._next_update = self._clock()

    def __call__(self, progress: Progress) -> None:
        """Shows a report."""
        if self._display is None:
            self._watch_in_lines(progress)
            return
        if progress.step == 0 and progress.stage in list(self._stages)[:-1]:
            self._begin()  # another video
        is_new = progress.stage not in self._stages
        self._stages[progress.stage] = progress
        is_end = progress.step >= progress.of
        if is_new or is_end or self._clock() >= self._next_update:
            if progress.stage == "decode" and is_end:
                self._preview = None
            elif (frames := progress.preview) is not None:
                self._preview = frames
            self._update()
            self._next_update = self._clock() + SECONDS_BETWEEN_UPDATES

    def _update(self) -> None:
        if self._handle is None:
            self._handle = self._display(self, display_id=True)
        else:
            self._handle.update(self)

    def __repr__(self) -> str:
        """Returns the newest report in words, for a front end without HTML."""
        return describe_progress(list(self._stages.values())[-1]) if self._stages else "nothing yet"

    def _repr_html_(self) -> str:
        rows = (
            (
                text(stage_label(progress)),
                element("progress", value=progress.step, max=max(1, progress.of)),
                text(f"{progress.step} of {progress.of}"),
                text(time_left(progress)),
            )
            for progress in self._stages.values()
        )
        image = ""
        if self._preview is not None:
            height, width = self._preview.shape[1:3]
            source = data_url(encode_webp(self._preview, LOOP_SECONDS), "image/webp")
            image = element("img", src=source, width=2 * width, height=2 * height, alt="preview")
        return table_of_html(rows) + image
