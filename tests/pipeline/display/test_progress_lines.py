"""Progress in words: a line every few seconds and at the end of a stage."""

from __future__ import annotations

import pytest

from kadr.pipeline.display.progress_lines import describe_progress, format_duration, watch_in_lines
from kadr.pipeline.progress import Progress


def test_lines_come_every_few_seconds_and_at_the_end_of_a_stage() -> None:
    now, printed = 0.0, list[str]()
    watch = watch_in_lines(printed.append, lambda: now)
    watch(Progress("text", 0, 1))
    watch(Progress("text", 1, 1, eta=0.0))
    for step in range(8):
        now += 2.0
        watch(Progress("denoise", step + 1, 9, eta=2.0 * (8 - step)))
    assert printed == ["encoding the prompt: 1 of 1", "denoising: 3 of 9, 0:12 left", "denoising: 6 of 9, 0:06 left"]


def test_line_names_window_and_video() -> None:
    progress = Progress("denoise", 1, 9, window=(2, 3))
    assert describe_progress(progress, (4, 5)) == "denoising, window 2 of 3, video 4 of 5: 1 of 9"


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (61.0, "1:01"), (3723.2, "1:02:03")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
