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
    torch._dynamo.reset()
    for contender in diffusers.create_transformed_contenders(stage_case, NAME, compile_module):
        if isinstance(contender, Contender):
            began = time.perf_counter()
            contender.run()
            note = f"the first run, which compiles, took {time.perf_counter() - began:.0f} s"
            contender = replace(contender, note=note)
        yield contender


def compile_module(module: nn.Module) -> nn.Module:
    if hasattr(module, "compile_repeated_blocks"):
        module.compile_repeated_blocks(dynamic=False)
    else:
        module.compile(dynamic=False)
    return module
