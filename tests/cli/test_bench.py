"""`kadr bench`: tables and JSON for the demo at the smallest size, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kadr.bench import benchmark, runner
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]
SMALLEST = ("--size", "64x64x9", "--rounds", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def quick_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.MATMUL_SIDES, "cpu", 64)
    monkeypatch.setattr(runner, "MIN_TIMED_SECONDS", 0.0)


def test_table_goes_to_stdout_and_progress_to_stderr(kadr: Run) -> None:
    result = kadr("bench", "--stage", "dit", *SMALLEST)
    assert result.code == 0, result.err
    _, _, title, head, auto, int8, *notes = result.out.splitlines()
    assert title.startswith("demo, 64x64x9: dit (matmul: float32 ")
    assert head.split()[:3] == ["dtype", "time", "IQR"]
    assert auto.startswith("kadr auto  float32")
    assert int8.startswith("kadr int8")
    assert all(note.startswith("kadr int8: ") for note in notes)  # if this CPU is slow at int8
    assert "demo 64x64x9 dit: reference" in result.err


def test_json_has_the_seconds_of_every_round(kadr: Run) -> None:
    result = kadr("bench", "--stage", "decode,end-to-end", "--schedule", "8", "--variant", "auto", *SMALLEST, "--json")
    report = json.loads(result.out)
    assert [case["stage"] for case in report["cases"]] == ["decode", "end-to-end"]
    for case in report["cases"]:
        (contender,) = case["contenders"]
        assert len(contender["seconds"]) == 2
        assert contender["error"] == 0  # the demo computes in float32 by default
        assert contender["peak_bytes"] is None or contender["peak_bytes"] >= 0


@pytest.mark.parametrize(
    "args, message",
    [
        (("--model", "3b"), "known are demo, 2b, 13b"),
        (("--stage", "dit,vae"), "there is no stage 'vae'"),
        (("--prompt-tokens", "100,257"), "prompt_tokens is 257; it must lie between 1 and 256"),
        (("--suite", "all"), "there is no suite 'all'; known are demo, released"),
        (("--variant", "fp4"), "there is no variant 'fp4'"),
        (("--size", "100x64x9"), "multiples of 32"),
        (("--num-layers", "2"), "num_layers must be"),
        (("--rounds", "0"), "rounds is 0"),
        (("--rounds", "1" + "0" * 30), "it must lie between 1 and 1000"),
    ],
)
def test_bad_usage_ends_with_2_before_any_measurement(kadr: Run, args: tuple[str, ...], message: str) -> None:
    result = kadr("bench", *args)
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())


def test_unknown_device_is_an_error(kadr: Run) -> None:
    result = kadr("bench", "--device", "tpu")
    assert result.code == 1
    assert "device is 'tpu'" in result.err
