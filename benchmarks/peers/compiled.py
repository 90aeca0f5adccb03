"""Contenders of diffusers with torch.compile, as its guide has it: the repeated block is compiled once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from benchmarks.peers import diffusers
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import StageCase

NAME = "diffusers compiled"


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    yield from create_compiled_contenders(stage_case, NAME)


def create_compiled_contenders(
    stage_case: StageCase, name: str, *, note: str = "", backend: str = "inductor"
) -> Iterator[Contender | SkippedContender]:
    """Yields contenders whose first run is done: it compiles."""
    torch._dynamo.reset()

    def compile_module(module: nn.Module) -> nn.Module:
        has_blocks = hasattr(module, "compile_repeated_blocks")
        compile_in_place = module.compile_repeated_blocks if has_blocks else module.compile
        compile_in_place(dynamic=False, backend=backend)
        return module

    for contender in diffusers.create_transformed_contenders(stage_case, name, compile_module):
        if isinstance(contender, Contender):
            began = time.perf_counter()
            contender.run()
            first = f"the first run, which compiles, took {time.perf_counter() - began:.0f} s"
            contender = replace(contender, note="; ".join(filter(None, (note, first))))
        yield contender
