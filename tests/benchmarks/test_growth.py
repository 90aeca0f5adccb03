"""Exponents: of powers that are known, and of the demo at the least sizes, with their table and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import growth, report
from kadr.bench import runner
from kadr.bench.cases import VideoShape
from kadr.models.transformer import TRANSFORMER_2B
from kadr.planning.flops import transformer_flops
from kadr.shapes import Size
from tests import doc_tables


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.37, 2.0])
def test_the_exponent_of_a_power_is_found_whatever_its_factor(power: float) -> None:
    x = [64, 256, 640, 4096]
    assert growth.fit_exponent(x, [3e-5 * value**power for value in x]) == pytest.approx(power)


def test_an_exponent_is_not_made_up() -> None:
    assert growth.fit_exponent([4], [2.0]) is None
    assert growth.fit_exponent([4, 8], [2.0, 0.0]) is None


def test_a_transformer_grows_with_tokens_from_their_first_power_to_their_second() -> None:
    few, many = [64, 128, 256], [200_000, 400_000]
    slopes = [growth.fit_exponent(x, [transformer_flops(TRANSFORMER_2B, n) for n in x]) for x in (few, many)]
    assert slopes[0] == pytest.approx(0.9, abs=0.15)  # below 1, because of the text
    assert slopes[1] == pytest.approx(2, abs=0.1)


def test_growth_of_the_demo_is_measured_told_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--side", "64", "128", "--frames", "9", "17"]
    monkeypatch.setattr(growth, "DECODE_SIZE", Size(64, 64))
    monkeypatch.setattr(runner, "MIN_TIMED_SECONDS", 0.0)
    assert growth.main(["--rounds", "1", *sizes, "--results", str(tmp_path), "--device", "cpu"]) == 0
    made = json.loads((tmp_path / "growth-cpu-demo.json").read_text())
    kinds = [(curve["what"], curve["contender"]) for curve in made["curves"]]
    assert kinds == [
        ("DiT step", "kadr auto"),
        ("DiT step", "official"),
        ("decode", "kadr auto"),
        ("decode's memory", "kadr auto"),
        ("decode", "official"),
        ("decode's memory", "official"),
    ]
    assert made["curves"][0]["x"] == [VideoShape(Size(side, side), 25).grid.num_tokens for side in (64, 128)]
    assert [curve["expected"] for curve in made["curves"] if "memory" in curve["what"]] == [0.0, 1.0]
    page, picture = tmp_path / "page.md", tmp_path / "images" / "growth.svg"
    page.write_text("".join("".join(doc_tables.marks(name)) for name in (report.CASES_MARK, report.GROWTH_MARK)))
    drawn = []
    for _ in range(2):
        assert report.main(["--results", str(tmp_path), "--page", str(page), "--picture", str(picture)]) == 0
        drawn.append(picture.read_text())
    assert "| demo | DiT step | 16 to 64 tokens | kadr auto |" in page.read_text()
    assert "<svg" in drawn[0]
    assert drawn[0] == drawn[1]
