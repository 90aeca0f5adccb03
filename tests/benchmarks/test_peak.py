"""The machine's peak: which loop, that it runs, and what stands for it where it cannot."""

from __future__ import annotations

import platform
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kadr.bench import peak
from kadr.bench.figures import summarize
from kadr.bench.machine import matmul_yardstick
from kadr.bench.peak import PeakError, choose_loop, compile_loop, peak_rate, peak_yardsticks
from kadr.bench.runner import Contender, Measurement
from kadr.memory.cpu import instruction_sets

CPU = torch.device("cpu")
ZEN5 = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")


@pytest.mark.parametrize(
    "dtype, instructions, loop",
    [
        ("float32", ZEN5, "FP32_512"),
        ("float32", ("avx2",), "FP32_256"),
        ("bfloat16", ZEN5, "BF16_512"),
        ("int8", ZEN5, "INT8_512"),
    ],
)
def test_the_widest_loop_of_a_dtype_is_chosen(dtype: str, instructions: tuple[str, ...], loop: str) -> None:
    assert choose_loop(dtype, instructions, "x86_64") == loop


@pytest.mark.parametrize(
    "dtype, instructions, architecture, reason",
    [
        ("float32", ("asimddp",), "aarch64", "for x86, and this is aarch64"),
        ("bfloat16", ("avx2", "avx512f"), "x86_64", "no instructions for a loop of bfloat16"),
        ("float16", ZEN5, "x86_64", "no instructions for a loop of float16"),
        ("int8", (*ZEN5, "amx_int8"), "AMD64", "amx_int8, which is faster than the loop"),
    ],
)
def test_no_loop_is_chosen_that_is_not_the_peak(
    dtype: str, instructions: tuple[str, ...], architecture: str, reason: str
) -> None:
    with pytest.raises(PeakError, match=reason):
        choose_loop(dtype, instructions, architecture)


@pytest.fixture
def loops() -> list[str]:
    """The loops that this machine can run."""
    if not any(map(shutil.which, peak.COMPILERS)):
        pytest.skip("there is no C compiler")
    found = []
    for choices in peak.LOOPS.values():
        found += [loop for instruction, loop in choices if instruction in instruction_sets()]
    if platform.machine() not in peak.X86 or not found:
        pytest.skip("the loops are for other machines")
    return found


def test_every_loop_compiles_and_runs(loops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "PEAK_SECONDS", 0.01)
    for loop in loops:
        assert peak_rate(compile_loop(loop, tmp_path)) > 1e9


def test_a_loop_is_at_least_as_fast_as_the_product_of_torch(loops: list[str]) -> None:
    with ExitStack() as stack:
        (yardstick,), notes = peak_yardsticks(["float32"], CPU, 512, stack)
        assert notes == []
        assert yardstick.time_runs is not None
        loop_rate = max(yardstick.yardstick_flops / yardstick.time_runs(1) for _ in range(3))
    product = matmul_yardstick("float32", CPU, 512)
    began, seconds = time.perf_counter(), []
    for _ in range(10):
        product.run()
        now = time.perf_counter()
        began, _ = now, seconds.append(now - began)
    assert loop_rate > 0.9 * product.yardstick_flops / min(seconds)


def test_what_a_compiler_or_a_program_says_is_the_reason(loops: list[str], tmp_path: Path) -> None:
    with pytest.raises(PeakError, match=r"ended with 1: .*define the arithmetic"):
        compile_loop("FP4", tmp_path)
    with pytest.raises(PeakError, match="cannot run"):
        peak_rate(tmp_path / "nothing")


def test_without_a_compiler_a_product_of_torch_is_the_peak_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(peak, "choose_loop", lambda *_: "FP32_512")
    with ExitStack() as stack:
        yardsticks, notes = peak_yardsticks(["float32", "int8"], CPU, 64, stack)
    assert [(each.name, each.dtype, each.is_peak) for each in yardsticks] == [
        ("matmul 64", "float32", True),
        ("matmul 64", "int8", True),
    ]
    assert notes[0] == (
        "the peak of float32 is that of torch's product of 64 rows: there is no C compiler (cc, gcc, clang)"
    )
    assert yardsticks[1].run().dtype == torch.int32


def test_a_share_is_of_the_peaks_best_round_in_the_dtype_of_the_products() -> None:
    def measured(seconds: list[float], **fields: object) -> Measurement:
        contender = Contender(run=lambda: None, **fields)  # type: ignore[arg-type]
        return Measurement(contender, seconds=seconds)

    def yardstick(dtype: str, seconds: list[float], is_peak: bool) -> Measurement:
        fields = {"name": dtype, "dtype": dtype, "is_yardstick": True, "is_peak": is_peak, "yardstick_flops": 100}
        return measured(seconds, **fields)

    plain, int8 = summarize(
        [
            measured([2.0, 2.0, 2.0], name="a", dtype="bfloat16"),
            measured([1.0, 1.0, 1.0], name="b", dtype="bfloat16", products="int8"),
            yardstick("bfloat16", [2.0, 2.0, 2.0], is_peak=False),
            yardstick("bfloat16", [4.0, 1.0, 4.0], is_peak=True),
            yardstick("int8", [0.5, 0.5, 0.5], is_peak=True),
        ],
        flops=100,
    )
    assert (plain["peak_per_second"], plain["share_of_peak"], plain["share_of_matmul"]) == (100, 0.5, 1.0)
    assert (int8["peak_per_second"], int8["share_of_peak"], int8["share_of_matmul"]) == (200, 0.5, None)
