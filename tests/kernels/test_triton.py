"""Without a GPU: Triton kernels agree with their definitions, and compile for current GPUs without a spill."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import KernelCase, ModelShape
from kadr.kernels import fused

pytest.importorskip("triton", reason="triton is for Linux only")
from tests import doc_tables, write_kernels
from tests.kernels.kernel_targets import SHAPES, TARGETS, NotCompiledError, compiler_for, variants

SMALL, LARGE = SHAPES
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|ld\.global\S*\.b128")  # 16 bytes at a time
# The other targets, sizes and dtypes are compiled by `make kernels`.
TESTED = [(target, LARGE, torch.bfloat16) for target in ("sm80", "sm89", "sm90")]
TESTED += [(target, SMALL, torch.bfloat16) for target in ("sm89", "sm120", "gfx942")]
TESTED += [("sm90", LARGE, torch.float32), ("sm80", SMALL, torch.float16)]


def needs_fp8(case: KernelCase) -> bool:
    return torch.float8_e4m3fn in case.arguments


def recorded_figures(target: str) -> write_kernels.Figures:
    """Returns the figures on the page; {} where it was written with another compiler, which may count otherwise."""
    is_same = write_kernels.compiler_line() in write_kernels.PAGE.read_text("utf-8")
    return write_kernels.read_figures(target) if is_same else {}


def test_every_kernel_agrees_with_its_definition_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("triton_cases.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("target, shape, dtype", TESTED, ids=lambda value: getattr(value, "name", str(value)))
def test_every_kernel_compiles_without_a_spill(target: str, shape: ModelShape, dtype: torch.dtype) -> None:
    """Rows are read 16 bytes at a time on NVIDIA's GPUs. Only what dispatch refuses there is not compiled."""
    arch, limits = TARGETS[target].arch, recorded_figures(target)
    has_fp8 = isinstance(arch, str) or divmod(arch, 10) >= fused.MIN_CAPABILITIES[torch.float8_e4m3fn]
    with compiler_for(target) as compile_case:
        for case in variants(shape, dtype):
            if needs_fp8(case) and not has_fp8:
                with pytest.raises(NotCompiledError):
                    compile_case(case)
                continue
            compiled = compile_case(case)
            name = write_kernels.kernel_name(case)
            limit = limits.get(name, replace(compiled.resources, spills=0))
            assert write_kernels.largest(limit, compiled.resources) == limit, (name, "to update the page: make kernels")
            assert case.module == "ggml" or isinstance(arch, str) or WIDE_LOAD.search(compiled.assembler), name


def test_spilled_registers_are_noticed() -> None:
    """With too few registers the compiler spills, and its report is read."""
    with compiler_for("sm80", maxnreg=24) as compile_case:
        (case,) = (
            case for case in variants(LARGE, torch.float32) if (case.name, case.note) == ("gelu_quantize", "int8")
        )
        assert compile_case(case).resources.spills > 0


@pytest.mark.parametrize("vendor", write_kernels.TABLES)
def test_kernels_page_has_every_kernel_and_every_target(vendor: str) -> None:
    """To update the tables: make kernels."""
    table = doc_tables.read_table(write_kernels.PAGE.read_text("utf-8"), vendor)
    head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert head == ["kernel", *write_kernels.targets_of(vendor)]
    assert [row[0] for row in rows] == [f"`{name}`" for name in write_kernels.kernel_names()]
    for name, *cells in rows:
        for cell in cells:
            figures = write_kernels.FIGURES.fullmatch(cell)
            assert figures or ("float8" in name and cell == write_kernels.NO_FP8), (name, cell)
            assert figures is None or figures["spills"] == "0", (name, cell)
