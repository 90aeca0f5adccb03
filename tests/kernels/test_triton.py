"""Triton kernels without a GPU agree with their definitions, and compile for current GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernels import EIGHT_BIT_DTYPES, ModelShape, cases

pytest.importorskip("triton", reason="triton is for Linux only")
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

SMALL_SHAPES = {
    "2B": ModelShape("2B", 2, 2048, 32, ((512, 1, 2, 4), (128, 1, 4, 8)), 2),
    "13B": ModelShape("13B", 2, 4096, 32, ((512, 1, 2, 4), (128, 1, 4, 8)), 2),
}
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|ld\.global\S*\.b128")  # 16 bytes at a time


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[Any]]:
    """Returns a function that sets a capability: later launches are compiled for it, listed, and not run."""
    compiled_kernels: list[Any] = []
    launch = jit.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled_kernels.append(launch(self, *arguments, grid=grid, warmup=True, **options))

    def target(capability: int) -> list[Any]:
        device = SimpleNamespace(
            get_current_device=lambda: (
                -capability
            ),  # kernels cache what they compiled by device; no real one is below 0
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
        monkeypatch.setattr(driver, "_active", device)
        return compiled_kernels

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return target


def test_every_kernel_agrees_with_its_definition_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("triton_cases.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("capability, size", [(80, "2B"), (89, "2B"), (90, "13B"), (120, "2B")])
def test_every_kernel_compiles(capability: int, size: str, compiled: Callable[[int], list[Any]]) -> None:
    """For Ampere, Ada, Hopper and Blackwell; fp8 from Ada on. Rows are read 16 bytes at a time."""
    compiled_kernels = compiled(capability)
    for case in cases(
        SMALL_SHAPES[size], "cpu", eight_bit_dtypes=EIGHT_BIT_DTYPES if capability >= 89 else EIGHT_BIT_DTYPES[:1]
    ):
        compiled_kernels.clear()
        case.kernel(*case.arguments)
        (kernel,) = compiled_kernels
        assert kernel.asm["cubin"], case
        assert case.module == "ggml" or WIDE_LOAD.search(kernel.asm["ptx"]), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_kernel_compiles_in_other_dtypes(dtype: torch.dtype, compiled: Callable[[int], list[Any]]) -> None:
    compiled_kernels = compiled(90)
    for case in cases(SMALL_SHAPES["2B"], "cpu", dtype):
        case.kernel(*case.arguments)
    assert all(kernel.asm["cubin"] for kernel in compiled_kernels)
