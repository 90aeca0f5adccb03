"""The peak of this machine: fused multiply-adds on registers alone, on all cores, by a C program compiled on the spot.

A product of large matrices, which torch gives, hides what torch itself leaves. `peak.c` reads no memory, so nothing on
this machine can be faster.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from kadr.bench.machine import matmul_yardstick
from kadr.bench.runner import Contender
from kadr.memory.cpu import instruction_sets, usable_cores

SOURCE = Path(__file__).with_name("peak.c")
COMPILERS = ("cc", "gcc", "clang")
X86 = ("x86_64", "amd64")
# dtype -> the instruction set, and the loop of peak.c, widest first
LOOPS: dict[str, tuple[tuple[str, str], ...]] = {
    "float32": (("avx512f", "FP32_512"), ("avx2", "FP32_256")),
    "bfloat16": (("avx512_bf16", "BF16_512"),),
    "int8": (("avx512_vnni", "INT8_512"),),
}
TILES = {"bfloat16": "amx_bf16", "int8": "amx_int8"}  # instructions that are faster than any on vector registers
PEAK_SECONDS, PEAK_RUNS = 0.06, 3  # of the loop, in every round; the best run counts
PEAK_FLOPS = 10**12  # the work whose seconds a peak stands for among contenders


class PeakError(Exception):
    """The loop cannot run here."""


def peak_yardsticks(
    dtypes: Iterable[str], device: torch.device, matmul_side: int, stack: ExitStack
) -> tuple[list[Contender], list[str]]:
    """Returns a yardstick of the peak for each dtype, and notes where it is torch's product instead.

    Args:
        dtypes: dtypes of products.
        matmul_side: rows, columns and inner side of such a product.
        stack: removes the programs when it closes.
    """
    yardsticks, notes = [], []
    for dtype in dtypes:
        try:
            yardsticks.append(_loop_yardstick(dtype, device, stack))
        except PeakError as error:
            notes.append(f"the peak of {dtype} is that of torch's product of {matmul_side} rows: {error}")
            yardsticks.append(matmul_yardstick(dtype, device, matmul_side, is_peak=True))
    return yardsticks, notes


def _loop_yardstick(dtype: str, device: torch.device, stack: ExitStack) -> Contender:
    if device.type != "cpu":
        raise PeakError("the loop is for CPUs")
    loop = choose_loop(dtype, instruction_sets(), platform.machine())
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kadr-peak-")))
    program = compile_loop(loop, folder)
    return Contender(
        name=f"peak {dtype}",
        run=partial(peak_rate, program),
        dtype=dtype,
        is_yardstick=True,
        is_peak=True,
        yardstick_flops=PEAK_FLOPS,
        time_runs=lambda _: PEAK_FLOPS / peak_rate(program),
    )


def choose_loop(dtype: str, instructions: Sequence[str], architecture: str) -> str:
    """Returns the fastest loop of `peak.c` for a dtype.

    Raises:
        PeakError: there is none, or the CPU has instructions that are faster.
    """
    if architecture.lower() not in X86:
        raise PeakError(f"the loops are for x86, and this is {architecture}")
    if TILES.get(dtype) in instructions:
        raise PeakError(f"this CPU has {TILES[dtype]}, which is faster than the loop")
    for instruction, loop in LOOPS.get(dtype, ()):
        if instruction in instructions:
            return loop
    raise PeakError(f"this CPU has no instructions for a loop of {dtype}")


def compile_loop(loop: str, folder: Path) -> Path:
    """Compiles one loop into a program in `folder`.

    Raises:
        PeakError: there is no C compiler, or it fails.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise PeakError(f"there is no C compiler ({', '.join(names)})")
    program = folder / loop.lower()
    _run([compiler, "-O2", f"-D{loop}", str(SOURCE), "-o", str(program), "-pthread"])
    return program


def peak_rate(program: Path) -> float:
    """Returns the operations of all cores in a second, at best."""
    return max(float(_run([str(program), str(usable_cores()), str(PEAK_SECONDS)])) for _ in range(PEAK_RUNS))


def _run(command: Sequence[str]) -> str:
    """Returns what a program prints.

    Raises:
        PeakError: it cannot be started, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True)
    except OSError as error:
        raise PeakError(f"{command[0]} cannot run: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [""]
        raise PeakError(f"{Path(command[0]).name} ended with {error.returncode}: {lines[0]}") from error
    return done.stdout
