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

from kadr.bench.cases import DEMO, END_TO_END, FLOAT32_VARIANT, STARTUP, Selection
from kadr.bench.kadr_contenders import kadr_contender, kadr_contenders
from kadr.bench.machine import MATMUL_SIDES, describe_machine, matmul_yardstick, yardstick_flops
from kadr.bench.model_files import open_model_files
from kadr.bench.peak_memory import cuda_peak_bytes, host_peak_bytes
from kadr.bench.runner import Contender, Measurement, SkippedContender, cuda_clock, error_line, host_clock, measure
from kadr.bench.stage_case import ContenderFactory, StageCase
from kadr.bench.startup import startup_contenders
from kadr.memory.device import free_bytes, pick_device
from kadr.planning.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.vae_stages import vae_decoder_parameters, vae_encoder_parameters

WARM_UPS = {"cuda": 3}  # else 1
MAX_ROUNDS = {STARTUP: 3}  # rounds at most: a process each time
LogFunction = Callable[[str], None]


def run_benchmark(
    selection: Selection,
    peer_factories: Sequence[ContenderFactory] = (),
    *,
    models_folder: Path | None = None,
    log: LogFunction = lambda _: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        peer_factories: others that do the same work.
        models_folder: keeps random models; see `models.opened`.
        log: told what is being done.

    Returns:
        `machine`, and `cases`: a list with the figures of every stage.
    """
    device = pick_device(selection.device)
    made: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    made |= {"machine": describe_machine(device), "cases": []}
    entrants = [startup_contenders, kadr_contenders(selection.variants), *peer_factories]
    for name in selection.models:
        log(f"{name}: weights")
        with open_model_files(name, selection, models_folder) as source, torch.no_grad():
            for clip in selection.shapes_for(name):
                for stage, schedule in _stages(selection, name):
                    work = StageCase(source, clip, stage, device, schedule)
                    made["cases"].append(measure_case(work, entrants, selection, log))
    return made


def _stages(selection: Selection, name: str) -> Iterator[tuple[str, str | None]]:
    """Each stage, with the schedule where it has one. The start is that of the bundled model."""
    for stage in selection.stages:
        if stage == STARTUP and name != DEMO:
            continue
        for schedule in selection.schedules if stage == END_TO_END else (None,):
            yield stage, schedule


def measure_case(
    stage_case: StageCase, factories: Sequence[ContenderFactory], selection: Selection, log: LogFunction
) -> dict[str, Any]:
    """The figures of one stage."""
    label = f"{stage_case.files.name} {stage_case.shape} {stage_case.stage}" + (
        f" {stage_case.schedule}" if stage_case.schedule else ""
    )
    on_cuda = stage_case.device.type == "cuda"
    log(f"{label}: reference")
    reference, compared = (
        _compute_reference(stage_case) if selection.compare_with_reference else (None, "not compared: --no-reference")
    )
    with ExitStack() as stack:
        ready, absent = _create_contenders(factories, stage_case, stack, log, label)
        side = selection.matmul_side or MATMUL_SIDES.get(stage_case.device.type, MATMUL_SIDES["cpu"])
        if stage_case.flops is not None:
            ready += [
                matmul_yardstick(dtype, stage_case.device, side)
                for dtype in dict.fromkeys(each.dtype for each in ready)
            ]
        log(f"{label}: {', '.join(each.name for each in ready)}")
        measured, failed = measure(
            ready,
            rounds=min(selection.rounds, MAX_ROUNDS.get(stage_case.stage, selection.rounds)),
            warm_ups=WARM_UPS.get(stage_case.device.type, 1),
            clock=cuda_clock if on_cuda and stage_case.stage != STARTUP else host_clock,
            peak=cuda_peak_bytes if on_cuda else host_peak_bytes,
            reference=reference,
        )
    gc.collect()
    return {
        "model": stage_case.files.name,
        "layers": stage_case.active_blocks,
        "size": str(stage_case.shape),
        "tokens": stage_case.shape.grid.num_tokens,
        "stage": stage_case.stage,
        "schedule": stage_case.schedule,
        "flops": stage_case.flops,
        "compared": compared,
        "contenders": summarize(measured, stage_case.flops, side),
        "absent": [{"name": each.name, "reason": each.reason} for each in (*absent, *failed)],
    }


def _create_contenders(
    factories: Sequence[ContenderFactory], stage_case: StageCase, stack: ExitStack, log: LogFunction, label: str
) -> tuple[list[Contender], list[SkippedContender]]:
    ready: list[Contender] = []
    absent: list[SkippedContender] = []
    for entrant in factories:
        for each in entrant(stage_case, stack):
            log(f"{label}: {each.name} {'is absent' if isinstance(each, SkippedContender) else 'is ready'}")
            absent.append(each) if isinstance(each, SkippedContender) else ready.append(each)
    return ready, absent


def _compute_reference(stage_case: StageCase) -> tuple[Tensor | None, str]:
    """The result in float32, and what it is of; or why there is none. Its module is gone when this returns."""
    if stage_case.stage == STARTUP:
        return None, "not compared: programs draw their noise in their own ways"
    needed, free = 4 * _num_parameters(stage_case), free_bytes(stage_case.device)
    if needed > 0.9 * free:
        return None, f"not compared: float32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))  # of float32, all bits
        contender = kadr_contender(stage_case, FLOAT32_VARIANT, stage_case.open_engine(FLOAT32_VARIANT), stack)
        try:
            result = contender.run()
        except MemoryError as error:
            return None, f"not compared: {error_line(error)}"
    del contender
    gc.collect()
    return result.cpu(), "kadr float32"


def _num_parameters(stage_case: StageCase) -> int:
    """In the weights that float32 has to hold at once."""
    text = text_encoder_parameters(stage_case.open_engine(FLOAT32_VARIANT).components.text_encoder_folder.config).total
    half = max(vae_encoder_parameters(stage_case.vae_config).total, vae_decoder_parameters(stage_case.vae_config).total)
    return {"text": text, "encode": half, "decode": half}.get(
        stage_case.stage, transformer_parameters(stage_case.transformer_config).total
    )


def summarize(measurements: Sequence[Measurement], flops: int | None, matmul_side: int) -> list[dict[str, Any]]:
    """Of each contender. The first of them is what the others are compared with."""
    yardsticks = {each.contender.dtype: each for each in measurements if each.contender.is_yardstick}
    compared = [each for each in measurements if not each.contender.is_yardstick]
    made = []
    for each in compared:
        contender, yardstick = each.contender, yardsticks.get(each.contender.dtype)
        rate = None if flops is None else flops / each.median
        share = None
        if flops is not None and yardstick is not None:  # of each round's own matmul
            share = flops / yardstick_flops(matmul_side) / each.ratio(yardstick)
        made.append(
            {
                "name": contender.name,
                "dtype": contender.dtype,
                "seconds": each.seconds,
                "times": each.repeats,
                "median": each.median,
                "spread": each.interquartile_range,
                "ratio": each.ratio(compared[0]),
                "flops_per_second": rate,
                "matmul_per_second": None if yardstick is None else yardstick_flops(matmul_side) / yardstick.median,
                "share_of_matmul": share,
                "peak": each.peak_bytes,
                "weights": contender.weight_bytes,
                "error": each.error,
                "note": contender.note,
            }
        )
    return made
