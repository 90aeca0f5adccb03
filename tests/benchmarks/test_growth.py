"""Exponents of growth: of known powers, and of the demo at the smallest sizes, with their table and plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import growth, report
from kadr.bench import runner
from kadr.bench.cases import VideoShape
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import StageCase
from kadr.models.transformer import TRANSFORMER_2B
from kadr.planning.costs.flops import transformer_flops
from kadr.shapes import Size
from tests import doc_tables
from tests.benchmarks.test_cases import demo_case


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.37, 2.0])
def test_the_exponent_of_a_power_is_fitted_whatever_its_factor(power: float) -> None:
    x = [64, 256, 640, 4096]
    assert growth.fit_exponent(x, [3e-5 * value**power for value in x]) == pytest.approx(power)


def test_no_exponent_is_fitted_to_too_few_or_zero_values() -> None:
    assert growth.fit_exponent([4], [2.0]) is None
    assert growth.fit_exponent([4, 8], [2.0, 0.0]) is None


def test_transformer_flops_grow_from_linear_to_quadratic_in_tokens() -> None:
    few, many = [64, 128, 256], [200_000, 400_000]
    slopes = [growth.fit_exponent(x, [transformer_flops(TRANSFORMER_2B, n) for n in x]) for x in (few, many)]
    assert slopes[0] == pytest.approx(0.9, abs=0.15)  # below 1, because of the text
    assert slopes[1] == pytest.approx(2, abs=0.1)


def test_released_sizes_reach_from_256_tokens_to_13376() -> None:
    tokens = [VideoShape.parse(size).grid.num_tokens for size in growth.RELEASED_SIZES]
    assert tokens == [256, 640, 2048, 6144, 13376]
    options = growth.build_parser().parse_args(["--model", "2b"])
    assert [str(shape) for shape in growth.shapes_of("dit", options)] == list(growth.RELEASED_SIZES)


def test_results_are_rows_of_the_plot_and_no_curve_is_dropped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import COLOURS, draw_curves

    def curve(contender: str) -> dict[str, object]:
        exponents = {"exponent": 1.5, "expected_exponent": 1.25}
        return {
            "quantity": "DiT step",
            "variable": "tokens",
            "contender": contender,
            "x": [1, 2],
            "y": [1, 3],
        } | exponents

    many = [curve(f"engine {number}") for number in range(len(COLOURS) + 1)]
    draw_curves(tmp_path / "x.svg", {"demo": [curve("kadr")], "2b, 2 blocks": many})
    drawing = (tmp_path / "x.svg").read_text("utf-8")
    for text in ("demo: DiT step", "2b, 2 blocks: DiT step", f"engine {len(COLOURS)}: 1.50, expected 1.25"):
        assert f"<!-- {text} -->" in drawing


def test_a_contender_has_the_sizes_that_it_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    case = replace(demo_case("8"), stage="dit")
    cases = [replace(case, shape=VideoShape(Size(side, side), 25)) for side in (64, 96, 128)]

    def create(case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
        yield Contender(name="whole", run=lambda: None, dtype="float32")
        if case.shape.size.width < 128:
            yield Contender(name="small", run=lambda: None, dtype="float32")
        else:
            yield SkippedContender("small", "no")
        if case.shape.size.width == 64:
            yield Contender(name="single", run=lambda: None, dtype="float32")

    whole, small = growth.measure_curves(cases, create, rounds=1)
    assert (whole.contender, whole.x, len(whole.y)) == ("whole", [16, 36, 64], 3)
    assert (small.contender, small.x, len(small.y)) == ("small", [16, 36], 2)
    err = capsys.readouterr().err
    assert "demo 128x128x25 dit 8: small no" in err
    assert "single: one size makes no curve" in err


def test_growth_of_the_demo_is_measured_reported_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--size", "64x64x25", "128x128x25", "--frames", "9", "17"]
    monkeypatch.setattr(growth, "DECODE_SIZE", Size(64, 64))
    monkeypatch.setattr(runner, "MIN_TIMED_SECONDS", 0.0)
    assert growth.main(["--rounds", "1", *sizes, "--results", str(tmp_path), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "growth-cpu-demo.json").read_text())
    curves = [(curve["quantity"], curve["contender"]) for curve in result["curves"]]
    assert curves == [
        ("DiT step", "kadr auto"),
        ("DiT step", "official"),
        ("decode", "kadr auto"),
        ("decode's memory", "kadr auto"),
        ("decode", "official"),
        ("decode's memory", "official"),
    ]
    assert result["curves"][0]["x"] == [VideoShape(Size(side, side), 25).grid.num_tokens for side in (64, 128)]
    memory_curves = [curve for curve in result["curves"] if "memory" in curve["quantity"]]
    assert [curve["expected_exponent"] for curve in memory_curves] == [0.0, 1.0]
    page, plot = tmp_path / "page.md", tmp_path / "images" / "growth.svg"
    page.write_text("".join("".join(doc_tables.marks(name)) for name in (report.CASES_MARK, report.GROWTH_MARK)))
    drawings = []
    for _ in range(2):
        assert report.main(["--results", str(tmp_path), "--page", str(page), "--plot", str(plot)]) == 0
        drawings.append(plot.read_text())
    assert "| demo | DiT step | 16 to 64 tokens | kadr auto |" in page.read_text()
    assert "<svg" in drawings[0]
    assert drawings[0] == drawings[1]
