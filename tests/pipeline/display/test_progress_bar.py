"""The progress bar: in a notebook one output that changes in place, elsewhere lines on stderr."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kadr import Progress, ProgressBar
from kadr.pipeline.display import progress_bar
from tests.html_reader import HtmlReader


class Output:
    """An output of a notebook that remembers each thing that it showed, as HTML."""

    def __init__(self) -> None:
        self.shown: list[HtmlReader] = []

    def update(self, shown: Any) -> None:
        self.shown.append(HtmlReader.read(shown._repr_html_()))


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """The outputs of a notebook."""
    outputs: list[Output] = []

    def display(shown: Any, *, display_id: bool) -> Output:
        assert display_id
        outputs.append(Output())
        outputs[-1].update(shown)
        return outputs[-1]

    monkeypatch.setattr(progress_bar, "notebook_display", lambda: display)
    return outputs


def preview(step: int = 0) -> np.ndarray:
    return np.full((2, 16, 24, 3), step, np.uint8)


def test_bar_has_a_row_for_each_stage_in_one_output(outputs: list[Output]) -> None:
    bar, now = ProgressBar(), [0.0]
    for progress in (Progress("text", 0, 1), Progress("text", 1, 1), Progress("denoise", 0, 4)):
        bar(progress)
    bar(Progress("denoise", 4, 4, eta=0.0))
    (output,) = outputs
    assert output.shown[-1].texts == ["encoding the prompt", "1 of 1", "denoising", "4 of 4"]
    bars = [each.attributes for each in output.shown[-1].elements if each.tag == "progress"]
    assert bars == [{"value": "1", "max": "1"}, {"value": "4", "max": "4"}]
    assert repr(bar) == "denoising: 4 of 4"
    assert now == [0.0]


def test_updates_are_at_least_a_quarter_of_a_second_apart(outputs: list[Output]) -> None:
    now = 0.0
    bar = ProgressBar(clock=lambda: now)
    for step in range(100):
        bar(Progress("denoise", step, 100, eta=1.0))
        now += 0.01
    assert 4 <= len(outputs[0].shown) <= 5


def test_preview_is_below_the_bars_until_the_video_is_decoded(outputs: list[Output]) -> None:
    bar = ProgressBar()
    bar(Progress("denoise", 0, 1))
    bar(Progress("denoise", 1, 1, render_preview=preview))
    image = outputs[0].shown[-1].find("img")
    assert (image["src"] or "").startswith("data:image/webp;base64,")
    assert (image["width"], image["height"]) == ("48", "32")
    bar(Progress("decode", 0, 9))
    assert outputs[0].shown[-1].find("img") == image
    bar(Progress("decode", 9, 9))
    assert "img" not in [each.tag for each in outputs[0].shown[-1].elements]


def test_previews_that_are_not_shown_are_not_computed(outputs: list[Output]) -> None:
    now, rendered = 0.0, list[int]()
    bar = ProgressBar(clock=lambda: now)
    bar(Progress("denoise", 0, 9))
    for step in range(1, 9):
        bar(Progress("denoise", step, 9, render_preview=lambda step=step: (rendered.append(step), preview())[1]))  # type: ignore[misc]
    assert rendered == []


def test_next_video_gets_an_output_of_its_own_and_a_retry_does_not(outputs: list[Output]) -> None:
    bar = ProgressBar()
    for _ in range(2):
        for stage in ("text", "denoise", "denoise", "decode"):  # the stage is repeated in float32
            bar(Progress(stage, 0, 1))
        bar(Progress("decode", 1, 1))
    assert len(outputs) == 2
    assert [len(output.shown) for output in outputs] == [4, 4]  # at the start of each stage, and at the end


def test_outside_of_a_notebook_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    for step in range(4):
        bar(Progress("denoise", step, 3, eta=0.0))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "denoising: 3 of 3\n")
