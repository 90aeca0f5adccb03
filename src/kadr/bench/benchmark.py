"""Runs the cases of a selection one after the other, with all contenders in turns. Results are plain data."""

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
from kadr.planning.costs.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.costs.vae_stages import vae_decoder_parameters, vae_encoder_parameters

WARM_UPS = {"cuda": 3}  # warm-up runs by device type; 1 elsewhere
MAX_ROUNDS = {STARTUP: 3}  # rounds at most: every start-up is a process
LogFunction = Callable[[str], None]


def run_benchmark(
    selection: Selection,
    peer_factories: Sequence[ContenderFactory] = (),
    *,
    models_folder: Path | None = None,
    log: LogFunction = lambda _: None,
) -> dict[str, Any]:
    """Measures every case of a selection.

    Args:
        peer_factories: create the other engines' contenders.
        models_folder: keeps random models; see `model_files.open_model_files`.
        log: called with a line about each piece of work.

    Returns:
        `date`, `machine`, and `cases`: a list with the figures of every stage.
    """
    device = pick_device(selection.device)
    result: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    result |= {"machine": describe_machine(device), "cases": []}
    factories = [startup_contenders, kadr_contenders(selection.variants), *peer_factories]
    for name in selection.models:
        log(f"{name}: weights")
        with open_model_files(name, selection, models_folder) as files, torch.no_grad():
            for shape in selection.shapes_for(name):
                for stage, schedule in _stages(selection, name):
                    stage_case = StageCase(files, shape, stage, device, schedule)
                    result["cases"].append(measure_case(stage_case, factories, selection, log))
    return result


def _stages(selection: Selection, name: str) -> Iterator[tuple[str, str | None]]:
    """Yields each stage, with each schedule where it has one. Only the bundled model has a start-up."""
    for stage in selection.stages:
        if stage == STARTUP and name != DEMO:
            continue
        for schedule in selection.schedules if stage == END_TO_END else (None,):
            yield stage, schedule


def measure_case(
    stage_case: StageCase, factories: Sequence[ContenderFactory], selection: Selection, log: LogFunction
) -> dict[str, Any]:
    """Returns the figures of one stage as plain data."""
    schedule = f" {stage_case.schedule}" if stage_case.schedule else ""
    label = f"{stage_case.files.name} {stage_case.shape} {stage_case.stage}{schedule}"
    on_cuda = stage_case.device.type == "cuda"
    log(f"{label}: reference")
    reference, reference_label = (
        _compute_reference(stage_case) if selection.compare_with_reference else (None, "not compared: --no-reference")
    )
    with ExitStack() as stack:
        contenders, skipped = _create_contenders(factories, stage_case, stack, log, label)
        side = selection.matmul_side or MATMUL_SIDES.get(stage_case.device.type, MATMUL_SIDES["cpu"])
        if stage_case.flops is not None:
            dtypes = dict.fromkeys(contender.dtype for contender in contenders)
            contenders += [matmul_yardstick(dtype, stage_case.device, side) for dtype in dtypes]
        log(f"{label}: {', '.join(contender.name for contender in contenders)}")
        measurements, failed = measure(
            contenders,
            rounds=min(selection.rounds, MAX_ROUNDS.get(stage_case.stage, selection.rounds)),
            warm_ups=WARM_UPS.get(stage_case.device.type, 1),
            clock=cuda_clock if on_cuda and stage_case.stage != STARTUP else host_clock,
            peak=cuda_peak_bytes if on_cuda else host_peak_bytes,
            reference=reference,
        )
    gc.collect()
    return {
        "model": stage_case.files.name,
        "blocks": stage_case.active_blocks,
        "size": str(stage_case.shape),
        "tokens": stage_case.shape.grid.num_tokens,
        "stage": stage_case.stage,
        "schedule": stage_case.schedule,
        "flops": stage_case.flops,
        "reference": reference_label,
        "contenders": summarize(measurements, stage_case.flops, side),
        "skipped": [{"name": contender.name, "reason": contender.reason} for contender in (*skipped, *failed)],
    }


def _create_contenders(
    factories: Sequence[ContenderFactory], stage_case: StageCase, stack: ExitStack, log: LogFunction, label: str
) -> tuple[list[Contender], list[SkippedContender]]:
    contenders: list[Contender] = []
    skipped: list[SkippedContender] = []
    for factory in factories:
        for contender in factory(stage_case, stack):
            if isinstance(contender, SkippedContender):
                log(f"{label}: {contender.name} is skipped")
                skipped.append(contender)
            else:
                log(f"{label}: {contender.name} is ready")
                contenders.append(contender)
    return contenders, skipped


def _compute_reference(stage_case: StageCase) -> tuple[Tensor | None, str]:
    """Returns the float32 result and a label; or None and the reason. Its module is freed on return."""
    if stage_case.stage == STARTUP:
        return None, "not compared: each program draws its own noise"
    needed, free = 4 * _num_parameters(stage_case), free_bytes(stage_case.device)
    if needed > 0.9 * free:
        return None, f"not compared: float32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))  # float32 with all its bits
        contender = kadr_contender(stage_case, FLOAT32_VARIANT, stage_case.open_engine(FLOAT32_VARIANT), stack)
        try:
            result = contender.run()
        except MemoryError as error:
            return None, f"not compared: {error_line(error)}"
    del contender
    gc.collect()
    return result.cpu(), "kadr float32"


def _num_parameters(stage_case: StageCase) -> int:
    """Returns how many weights float32 holds at once in this stage."""
    spec = stage_case.open_engine(FLOAT32_VARIANT).spec
    text = text_encoder_parameters(spec.text_encoder_checkpoint.config).total
    half = max(vae_encoder_parameters(stage_case.vae_config).total, vae_decoder_parameters(stage_case.vae_config).total)
    return {"text": text, "encode": half, "decode": half}.get(
        stage_case.stage, transformer_parameters(stage_case.transformer_config).total
    )


def summarize(measurements: Sequence[Measurement], flops: int | None, matmul_side: int) -> list[dict[str, Any]]:
    """Returns the figures of each contender; ratios are to the first of them. Yardsticks are not listed."""
    yardsticks = {each.contender.dtype: each for each in measurements if each.contender.is_yardstick}
    ranked = [each for each in measurements if not each.contender.is_yardstick]
    figures = []
    for measurement in ranked:
        contender, yardstick = measurement.contender, yardsticks.get(measurement.contender.dtype)
        flops_per_second = None if flops is None else flops / measurement.median
        share = None
        if flops is not None and yardstick is not None:  # the matmul of the same round
            share = flops / yardstick_flops(matmul_side) / measurement.ratio(yardstick)
        figures.append(
            {
                "name": contender.name,
                "dtype": contender.dtype,
                "seconds": measurement.seconds,
                "repeats": measurement.repeats,
                "median": measurement.median,
                "interquartile_range": measurement.interquartile_range,
                "ratio": measurement.ratio(ranked[0]),
                "flops_per_second": flops_per_second,
                "matmul_per_second": None if yardstick is None else yardstick_flops(matmul_side) / yardstick.median,
                "share_of_matmul": share,
                "peak_bytes": measurement.peak_bytes,
                "weight_bytes": contender.weight_bytes,
                "error": measurement.error,
                "note": contender.note,
            }
        )
    return figures
