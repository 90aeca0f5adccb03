"""Previews on a terminal: the newest one as half-block characters, under the progress bars.

A half block has two colours, so a character shows two pixels, one above the other. They are ordinary text to rich,
which redraws them with the bars and removes them at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from kadr.cli.terminal.errors import is_quiet, print_stderr

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment
    from rich.style import Style

HALF_BLOCK = "▀"
MAX_PREVIEW_ROWS = 16  # characters; each redraw of them sends about 30 KB to the terminal
_LINES_FOR_BARS = 8  # of a small terminal
FRAMES_PER_SECOND = 4  # about the pace of the video: a frame of a preview stands for eight of it
_COLOR_SYSTEMS = ("256", "truecolor")

Color = tuple[int, int, int]


def open_preview() -> TerminalPreview | None:
    """Returns what shows previews on stderr, or says why it cannot and returns None."""
    reason = _why_none()
    if reason is None:
        return TerminalPreview()
    print_stderr(f"there are no previews: {reason}")
    return None


def _why_none() -> str | None:
    """Returns why stderr cannot show previews, by what it and the environment say of it; it is not asked itself."""
    if is_quiet():
        return "--quiet keeps them away"
    if not sys.stderr.isatty():
        return "stderr is not a terminal"
    from rich.console import Console

    console = Console(stderr=True)
    if console.color_system not in _COLOR_SYSTEMS or console.no_color:
        return "this terminal does not say that it has 256 colours; if it has, set COLORTERM=truecolor"
    try:
        HALF_BLOCK.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return f"its encoding, {console.encoding}, has no half blocks; UTF-8 has"
    return None


class TerminalPreview:
    """A renderable of rich: the newest preview, its frames one after another.

    Args:
        clock: seconds, from which the frame that is shown follows.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._frames: np.ndarray | None = None

    def show(self, frames: np.ndarray | None) -> None:
        """Shows another preview, uint8 (f, h, w, 3), from the next redraw on; None shows none."""
        self._frames = frames

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        frames, max_rows = self._frames, min(MAX_PREVIEW_ROWS, console.height - _LINES_FOR_BARS)
        if frames is None or max_rows < 1:
            return
        frame = frames[int(self._clock() * FRAMES_PER_SECOND) % len(frames)]
        for above, below in _rows_of_pairs(frame, options.max_width, max_rows):
            for (top, bottom), run in groupby(zip(above, below, strict=True)):
                yield Segment(HALF_BLOCK * len(list(run)), _style(top, bottom))
            yield Segment.line()


def _rows_of_pairs(
    frame: np.ndarray, max_columns: int, max_rows: int
) -> Iterator[tuple[Sequence[Color], Sequence[Color]]]:
    """Yields the two rows of pixels of each row of characters, of a frame that is scaled to fit."""
    import numpy as np
    from PIL import Image

    height, width = frame.shape[:2]
    scale = min(max_columns / width, 2 * max_rows / height)
    columns, rows = max(1, int(width * scale)), max(1, int(height * scale / 2))
    pixels = Image.fromarray(frame).resize((columns, 2 * rows), Image.Resampling.BOX)
    colors = [[tuple(color) for color in row] for row in np.asarray(pixels).tolist()]
    yield from zip(colors[::2], colors[1::2], strict=True)


@lru_cache(4096)
def _style(top: Color, bottom: Color) -> Style:
    from rich.color import Color as RichColor
    from rich.style import Style

    return Style(color=RichColor.from_rgb(*top), bgcolor=RichColor.from_rgb(*bottom))
