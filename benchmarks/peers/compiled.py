"""diffusers through torch.compile, as its guide has it: the block that repeats is compiled once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from benchmarks.peers import diffusers
from kadr.bench.runner import Absent, Contender
from kadr.bench.stage_case import Work

NAME = "diffusers compiled"


def enter(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
    torch._dynamo.reset()
    for each in diffusers.contenders(work, NAME, compiled):
        if isinstance(each, Contender):
            began = time.perf_counter()
            each.run()
            each = replace(each, note=f"the first run, which compiles, took {time.perf_counter() - began:.0f} s")
        yield each


def compiled(module: nn.Module) -> nn.Module:
    if hasattr(module, "compile_repeated_blocks"):
        module.compile_repeated_blocks(dynamic=False)
    else:
        module.compile(dynamic=False)
    return module
