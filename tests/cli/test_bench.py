"""`kadr bench`: tables and JSON of the demo at the least size, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kadr.bench import benchmark, runner
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]
LEAST = ("--size", "64x64x9", "--rounds", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.MATMUL_SIDES, "cpu", 64)
    monkeypatch.setattr(runner, "MIN_TIMED_SECONDS", 0.0)


def test_a_table_is_data_and_progress_is_talk(kadr: Run) -> None:
    ended = kadr("bench", "--stage", "dit", *LEAST)
    assert ended.code == 0, ended.err
    _, _, title, head, auto, int8, *notes = ended.out.splitlines()
    assert title.startswith("demo, 64x64x9: dit  (matmul: float32 ")
    assert head.split()[:3] == ["dtype", "time", "IQR"]
    assert auto.startswith("kadr auto  float32")
    assert int8.startswith("kadr int8")
    assert all(note.startswith("kadr int8: ") for note in notes)  # where this CPU is slow at int8
    assert "demo 64x64x9 dit: reference" in ended.err


def test_json_has_every_figure_of_every_round(kadr: Run) -> None:
    ended = kadr("bench", "--stage", "decode,end-to-end", "--schedule", "8", "--variant", "auto", *LEAST, "--json")
    made = json.loads(ended.out)
    assert [case["stage"] for case in made["cases"]] == ["decode", "end-to-end"]
    for case in made["cases"]:
        (figure,) = case["contenders"]
        assert len(figure["seconds"]) == 2
        assert figure["error"] == 0  # the demo is float32 as it comes
        assert figure["peak_bytes"] is None or figure["peak_bytes"] >= 0


@pytest.mark.parametrize(
    "words, said",
    [
        (("--model", "3b"), "known are demo, 2b, 13b"),
        (("--stage", "dit,vae"), "there is no stage 'vae'"),
        (("--variant", "fp4"), "there is no variant 'fp4'"),
        (("--size", "100x64x9"), "multiples of 32"),
        (("--num-layers", "2"), "num_layers must be"),
        (("--rounds", "0"), "rounds is 0"),
    ],
)
def test_bad_usage_is_told_before_torch_does_anything(kadr: Run, words: tuple[str, ...], said: str) -> None:
    ended = kadr("bench", *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in " ".join(ended.err.split())


def test_a_device_that_is_not_there_is_told(kadr: Run) -> None:
    ended = kadr("bench", "--device", "tpu")
    assert ended.code == 1
    assert "device is 'tpu'" in ended.err
