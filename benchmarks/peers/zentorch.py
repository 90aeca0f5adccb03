"""Contenders of diffusers compiled by zentorch, AMD's backend of torch.compile for its CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import zentorch  # registers the backend

from benchmarks.peers.compiled import create_compiled_contenders
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import StageCase

NAME = "diffusers zentorch"


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    if stage_case.device.type != "cpu":
        yield SkippedContender(NAME, "compiles for CPUs")
        return
    yield from create_compiled_contenders(
        stage_case, NAME, note=f"zentorch {zentorch.__version__}", backend=zentorch.__name__
    )
