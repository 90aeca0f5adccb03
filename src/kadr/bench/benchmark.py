"""All cases of a selection, one after the other; within each, all contenders in turns. The outcome is plain data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.bench.cases import DEMO, END_TO_END, REFERENCE, STARTUP, Selection
from kadr.bench.kadr_contenders import own, ways
from kadr.bench.machine import SIDES, describe, yardstick, yardstick_flops
from kadr.bench.model_files import opened
from kadr.bench.peak_memory import cuda_peak, host_peak
from kadr.bench.runner import Absent, Contender, Measured, cuda_clock, host_clock, measure, told
from kadr.bench.stage_case import Entrants, Work
from kadr.bench.startup import command
from kadr.memory.device import free_bytes, pick_device
from kadr.planning.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.vae_stages import vae_decoder_parameters, vae_encoder_parameters

WARM_UPS = {"cuda": 3}  # else 1
FEWER = {STARTUP: 3}  # rounds at most: a process each time
Say = Callable[[str], None]


def run(
    selection: Selection, peers: Sequence[Entrants] = (), *, folder: Path | None = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure.

    Args:
        peers: others that do the same work.
        folder: keeps random models; see `models.opened`.
        say: told what is being done.

    Returns:
        `machine`, and `cases`: a list with the figures of every stage.
    """
    device = pick_device(selection.device)
    made: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    made |= {"machine": describe(device), "cases": []}
    entrants = [command, ways(selection.ways), *peers]
    for name in selection.models:
        say(f"{name}: weights")
        with opened(name, selection, folder) as source, torch.no_grad():
            for clip in selection.clips_of(name):
                for stage, schedule in _stages(selection, name):
                    work = Work(source, clip, stage, device, schedule)
                    made["cases"].append(case(work, entrants, selection, say))
    return made


def _stages(selection: Selection, name: str) -> Iterator[tuple[str, str | None]]:
    """Each stage, with the schedule where it has one. The start is that of the bundled model."""
    for stage in selection.stages:
        if stage == STARTUP and name != DEMO:
            continue
        for schedule in selection.schedules if stage == END_TO_END else (None,):
            yield stage, schedule


def case(work: Work, entrants: Sequence[Entrants], selection: Selection, say: Say) -> dict[str, Any]:
    """The figures of one stage."""
    label = f"{work.source.name} {work.clip} {work.stage}" + (f" {work.schedule}" if work.schedule else "")
    on_cuda = work.device.type == "cuda"
    say(f"{label}: reference")
    reference, compared = _reference(work) if selection.reference else (None, "not compared: --no-reference")
    with ExitStack() as stack:
        ready, absent = _entered(entrants, work, stack, say, label)
        side = selection.matmul or SIDES.get(work.device.type, SIDES["cpu"])
        if work.flops is not None:
            ready += [yardstick(dtype, work.device, side) for dtype in dict.fromkeys(each.dtype for each in ready)]
        say(f"{label}: {', '.join(each.name for each in ready)}")
        measured, failed = measure(
            ready,
            rounds=min(selection.rounds, FEWER.get(work.stage, selection.rounds)),
            warm_ups=WARM_UPS.get(work.device.type, 1),
            clock=cuda_clock if on_cuda and work.stage != STARTUP else host_clock,
            peak=cuda_peak if on_cuda else host_peak,
            reference=reference,
        )
    gc.collect()
    return {
        "model": work.source.name,
        "layers": work.layers,
        "size": str(work.clip),
        "tokens": work.clip.grid.num_tokens,
        "stage": work.stage,
        "schedule": work.schedule,
        "flops": work.flops,
        "compared": compared,
        "contenders": figures(measured, work.flops, side),
        "absent": [{"name": each.name, "reason": each.reason} for each in (*absent, *failed)],
    }


def _entered(
    entrants: Sequence[Entrants], work: Work, stack: ExitStack, say: Say, label: str
) -> tuple[list[Contender], list[Absent]]:
    ready: list[Contender] = []
    absent: list[Absent] = []
    for entrant in entrants:
        for each in entrant(work, stack):
            say(f"{label}: {each.name} {'is absent' if isinstance(each, Absent) else 'is ready'}")
            absent.append(each) if isinstance(each, Absent) else ready.append(each)
    return ready, absent


def _reference(work: Work) -> tuple[Tensor | None, str]:
    """The result in float32, and what it is of; or why there is none. Its module is gone when this returns."""
    if work.stage == STARTUP:
        return None, "not compared: programs draw their noise in their own ways"
    needed, free = 4 * _numbers(work), free_bytes(work.device)
    if needed > 0.9 * free:
        return None, f"not compared: float32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))  # of float32, all bits
        contender = own(work, REFERENCE, work.engine(REFERENCE), stack)
        try:
            result = contender.run()
        except MemoryError as error:
            return None, f"not compared: {told(error)}"
    del contender
    gc.collect()
    return result.cpu(), "kadr float32"


def _numbers(work: Work) -> int:
    """In the weights that float32 has to hold at once."""
    text = text_encoder_parameters(work.engine(REFERENCE).components.text_encoder_folder.config).total
    half = max(vae_encoder_parameters(work.vae).total, vae_decoder_parameters(work.vae).total)
    return {"text": text, "encode": half, "decode": half}.get(
        work.stage, transformer_parameters(work.transformer).total
    )


def figures(measured: Sequence[Measured], flops: int | None, side: int) -> list[dict[str, Any]]:
    """Of each contender. The first of them is what the others are compared with."""
    yardsticks = {each.contender.dtype: each for each in measured if each.contender.yardstick}
    compared = [each for each in measured if not each.contender.yardstick]
    made = []
    for each in compared:
        contender, yardstick = each.contender, yardsticks.get(each.contender.dtype)
        rate = None if flops is None else flops / each.median
        share = None
        if flops is not None and yardstick is not None:  # of each round's own matmul
            share = flops / yardstick_flops(side) / each.ratio(yardstick)
        made.append(
            {
                "name": contender.name,
                "dtype": contender.dtype,
                "seconds": each.seconds,
                "times": each.times,
                "median": each.median,
                "spread": each.spread,
                "ratio": each.ratio(compared[0]),
                "flops_per_second": rate,
                "matmul_per_second": None if yardstick is None else yardstick_flops(side) / yardstick.median,
                "share_of_matmul": share,
                "peak": each.peak,
                "weights": contender.weights,
                "error": each.error,
                "note": contender.note,
            }
        )
    return made
