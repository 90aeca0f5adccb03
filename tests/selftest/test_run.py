"""The self-test passes on the demo in every weight format, goes on after a failure, and says so without folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kadr import CancelToken, Engine
from kadr.cancellation import cancellable
from kadr.cli.commands.quantize import quantize
from kadr.errors import Cancelled, CheckpointError
from kadr.quant.weight_formats import AUTO_QUANT, NONE, WEIGHT_FORMATS
from kadr.selftest.report import report_lines
from kadr.selftest.result import Check, NotRun, SelftestReport
from kadr.selftest.run import run_selftest
from kadr.selftest.subject import Subject
from tests.golden.test_quantized import write_fp8
from tests.selftest.faulty_models import DEMO, TEAL_LORA

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(instructions for int8|no fp8 matmuls)", "ignore:.*has Hadamard-rotated weights"
)
FAST_FORMATS = ("int8", "Q4_K")


def report_of(model: str | Path, **options: object) -> SelftestReport:
    return run_selftest(Engine.open(model, device="cpu", prompt_cache=False, **options))  # type: ignore[arg-type]


def format_cases() -> Iterator[object]:
    for name in WEIGHT_FORMATS:
        if name not in (NONE, AUTO_QUANT):
            yield pytest.param(name, marks=() if name in FAST_FORMATS else pytest.mark.slow)


@pytest.mark.parametrize("weight_format", format_cases())
def test_demo_passes_in_every_weight_format(weight_format: str) -> None:
    assert report_of("demo", quant=weight_format).failed_stages == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distilled_demo_with_a_lora_passes(dtype: str) -> None:
    report = report_of("demo-distilled", loras=[TEAL_LORA], dtype=dtype)
    assert report.failed_stages == ()
    assert {stage.verdict for stage in report.stages} == {"pass"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_of_the_demo_passes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.gguf"
    quantize(str(DEMO), path, kind)
    assert report_of(path, vae=DEMO, text_encoder=DEMO.parent, release="demo").failed_stages == ()


@pytest.mark.parametrize("rotation_size", [None, 64])
def test_fp8_files_pass_rotated_back_or_plain(rotation_size: int | None, tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "fp8.safetensors", rotation_size=rotation_size)
    assert report_of(path, text_encoder=DEMO.parent, release="demo").failed_stages == ()


def fail_at_a_path(subject: Subject) -> Iterator[Check]:
    yield Check("figure", 1.0, 0.0, 2.0)
    raise CheckpointError(f"{DEMO} is damaged.")


def skip(subject: Subject) -> Iterator[Check]:
    raise NotRun("there is nothing")


def succeed(subject: Subject) -> Iterator[Check]:
    yield Check("other figure", 3.0)


def test_a_stage_that_fails_does_not_stop_the_others() -> None:
    begun: list[str] = []
    stages = {"broken": fail_at_a_path, "empty": skip, "whole": succeed}
    report = run_selftest(Engine.open("demo", device="cpu"), stages=stages, begin=begun.append)
    assert begun == list(stages)
    assert [stage.verdict for stage in report.stages] == ["fail", "not run", "pass"]
    assert report.failed_stages == ("broken",)
    assert report.to_json()["verdict"] == "fail"


def test_report_names_files_and_no_folder() -> None:
    report = run_selftest(Engine.open(DEMO, device="cpu", release="demo"), stages={"broken": fail_at_a_path})
    text = "\n".join(report_lines(report))
    assert text.startswith("kadr selftest of demo.safetensors: fail")
    assert "demo.safetensors is damaged." in text
    assert "sha256 13a8431358140de8" in text
    assert str(DEMO.parent) not in text + str(report.to_json())


def test_cancelled_test_ends_at_once() -> None:
    def cancel(subject: Subject) -> Iterator[Check]:
        token.cancel()
        raise Cancelled("")
        yield

    token = CancelToken()
    with cancellable(token), pytest.raises(Cancelled):
        run_selftest(Engine.open("demo", device="cpu"), stages={"cancelled": cancel, "next": succeed})


@pytest.mark.parametrize(
    "check, passed, words",
    [
        (Check("x", 1.0, 1.0, 2.0), True, "x 1 (1 to 2)"),
        (Check("x", 2.5, None, 2.0, "row 3"), False, "x 2.5 (at most 2): row 3"),
        (Check("x", 0.5, 1.0), False, "x 0.5 (at least 1)"),
        (Check("x", float("nan")), False, "x nan (for information)"),
    ],
)
def test_check_compares_its_figure_with_both_limits(check: Check, passed: bool, words: str) -> None:
    assert (check.passed, check.describe()) == (passed, words)
