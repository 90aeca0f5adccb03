"""Exponents of growth: of known powers, and of the demo at the smallest sizes, with their table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import growth, report
from kadr.bench import runner
from kadr.bench.cases import VideoShape
from kadr.models.transformer import TRANSFORMER_2B
from kadr.planning.costs.flops import transformer_flops
from kadr.shapes import Size
from tests import doc_tables


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


def test_growth_of_the_demo_is_measured_reported_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--side", "64", "128", "--frames", "9", "17"]
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
