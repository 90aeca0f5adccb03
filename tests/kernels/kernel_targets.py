"""Compiles every Triton kernel for GPUs that are not there, by the package's own launches, and reads what each takes.

A launch is replaced by the compilation that precedes it, for a target that is named: arguments decide the variant just
as they do on a GPU. The compilers for NVIDIA's GPUs and for AMD's are in triton's wheel.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime import driver, jit

from benchmarks.kernels import KernelCase, ModelShape, cases

TARGETS = {f"sm{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 89, 90, 100, 120)} | {
    name: GPUTarget("hip", name, warp_size)
    for name, warp_size in (("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32), ("gfx1201", 32))
}
# Widths and channels are those of the released models. Few tokens: the variant does not depend on their number.
SHAPES = (
    ModelShape("2B", 2, 2048, 32, ((512, 1, 2, 4), (128, 1, 4, 8)), 2),
    ModelShape("13B", 2, 4096, 32, ((512, 1, 2, 4), (128, 1, 4, 8)), 2),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONAL_ARGUMENTS = {  # indices of those that a caller may leave out, together
    "gate_residual": (1,),
    "gate_residual_norm_modulate": (1,),
    "gate_residual_norm_modulate_quantize": (1,),
    "norm_rope": (2,),
    "rescale": (3,),
    "pixel_norm_modulate_silu": (1, 2),
    "bias_residual": (1,),
}
# ptxas -v reports bytes of the stack for spilled registers; the text of AMD's assembler counts registers.
PTXAS_REPORT = re.compile(r"(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)
AMD_REGISTERS = re.compile(r"\.vgpr_count:\s+(\d+)")
AMD_SPILLS = re.compile(r"\.vgpr_spill_count:\s+(\d+)")
NO_FP8 = "type fp8e4nv not supported in this architecture"
_device_numbers = itertools.count(1)


@dataclass(frozen=True)
class Resources:
    """Figures of a compiled kernel. registers: of a thread; spills: bytes, on AMD registers, of a thread."""

    registers: int
    shared_bytes: int
    spills: int


class NotCompiledError(Exception):
    """A target has no instructions for a kernel."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for a target, with its assembler text."""

    kernel: Any
    resources: Resources

    @property
    def assembler(self) -> str:
        return str(self.kernel.asm.get("ptx") or self.kernel.asm["amdgcn"])


def variants(shape: ModelShape, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Yields every kernel that kadr launches at one size in one dtype, also without its optional arguments."""
    for case in cases(shape, "cpu", dtype):
        yield case
        if case.name == "rescale":  # of fp8 matmuls that apply no scales; their sums are floats
            sums = case.arguments[0].to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
            yield replace(case, arguments=(sums, *case.arguments[1:]))
        if left_out := OPTIONAL_ARGUMENTS.get(case.name):
            yield replace(case, arguments=tuple(None if i in left_out else a for i, a in enumerate(case.arguments)))


@contextmanager
def compiler_for(name: str, **compiler_options: Any) -> Iterator[Callable[[KernelCase], Compiled]]:
    """Yields a function that compiles the one kernel that a case launches for a target of `TARGETS`.

    That function raises `NotCompiledError` where the target lacks a dtype of the kernel.
    """
    # Kernels remember what they compiled by the number of a device. No real one is below 0, and each of these is new.
    number = -next(_device_numbers)
    device = SimpleNamespace(
        get_current_device=lambda: number,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: TARGETS[name],
    )
    launched: list[Any] = []
    launch = jit.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(launch(self, *arguments, grid=grid, warmup=True, **options, **compiler_options))

    with (
        TemporaryDirectory() as folder,
        patch.object(driver, "_active", device),
        patch.object(jit.JITFunction, "run", compile_only),
        patch.object(knobs.cache, "dir", folder),
        patch.object(knobs.nvidia, "dump_ptxas_log", True),
    ):
        yield partial(_compile, launched, {})


def _compile(launched: list[Any], known: dict[int, Compiled], case: KernelCase) -> Compiled:
    launched.clear()
    log = StringIO()
    try:
        with redirect_stdout(log):
            case.kernel(*case.arguments)
    except CompilationError as error:
        if NO_FP8 not in _messages(error):
            raise
        raise NotCompiledError(NO_FP8) from error
    (kernel,) = launched
    if id(kernel) not in known:  # a variant that came before is not compiled again
        known[id(kernel)] = Compiled(kernel, read_resources(kernel, log.getvalue()))
    return known[id(kernel)]


def _messages(error: BaseException | None) -> str:
    return "" if error is None else f"{error}\n{_messages(error.__cause__)}"


def read_resources(kernel: Any, log: str) -> Resources:
    """Reads the resources of a compiled kernel from the log of ptxas, or from AMD's assembler text.

    Raises:
        ValueError: there are none in it.
    """
    shared_bytes = kernel.metadata.shared
    if report := PTXAS_REPORT.search(log):
        return Resources(int(report[2]), shared_bytes, int(report[1]))
    text = kernel.asm.get("amdgcn", "")
    registers, spills = AMD_REGISTERS.search(text), AMD_SPILLS.search(text)
    if registers is None or spills is None:
        raise ValueError(f"neither ptxas nor the assembler text says what {kernel.metadata.name} takes: {log[:200]!r}")
    return Resources(int(registers[1]), shared_bytes, int(spills[1]))
