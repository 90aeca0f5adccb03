"""Runs the cases of selections one after the other, with all contenders in turns. Results are plain data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.bench.cases import DEMO, END_TO_END, FLOAT32_VARIANT, STARTUP, TEXT, Selection
from kadr.bench.figures import summarize
from kadr.bench.kadr_contenders import kadr_contender, kadr_contenders
from kadr.bench.machine import MATMUL_SIDES, describe_machine, matmul_yardstick
from kadr.bench.model_files import ModelFiles, open_model_files
from kadr.bench.peak import peak_yardsticks
from kadr.bench.peak_memory import peak_memory_for
from kadr.bench.runner import Contender, SkippedContender, clock_for, error_line, host_clock, measure
from kadr.bench.stage_case import ContenderFactory, StageCase
from kadr.bench.startup import startup_contenders
from kadr.memory.device import free_bytes, pick_device
from kadr.planning.costs.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.costs.vae_stages import vae_decoder_parameters, vae_encoder_parameters

WARM_UPS = {"cuda": 3}  # warm-up runs by device type; 1 elsewhere
MAX_ROUNDS = {STARTUP: 3}  # rounds at most: every start-up is a process
LogFunction = Callable[[str], None]
SaveFunction = Callable[[dict[str, Any]], None]


def run_benchmark(
    selections: Sequence[Selection],
    peer_factories: Sequence[ContenderFactory] = (),
    *,
    models_folder: Path | None = None,
    log: LogFunction = lambda _: None,
    earlier: Sequence[Mapping[str, Any]] = (),
    save: SaveFunction = lambda _: None,
) -> dict[str, Any]:
    """Measures every case of the selections.

    Args:
        peer_factories: create the other engines' contenders.
        models_folder: keeps random models; see `model_files.open_model_files`.
        log: called with a line about each piece of work.
        earlier: cases of an interrupted run, which are not measured again.
        save: called with the result so far after each case.

    Returns:
        `date`, `machine`, and `cases`: a list with the figures of every stage.
    """
    device = pick_device(selections[0].device)
    result: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    result |= {"machine": describe_machine(device), "cases": list(earlier)}
    for selection in selections:
        factories = [startup_contenders, kadr_contenders(selection.variants), *peer_factories]
        for name in selection.models:
            log(f"{name}: weights")
            with open_model_files(name, selection, models_folder) as files, torch.no_grad():
                for stage_case in stage_cases(files, selection, device):
                    if any(stage_case.identity.items() <= case.items() for case in earlier):
                        log(f"{stage_case}: measured already")
                        continue
                    result["cases"].append(measure_case(stage_case, factories, selection, log))
                    save(result)
    return result


def stage_cases(files: ModelFiles, selection: Selection, device: torch.device) -> Iterator[StageCase]:
    """Yields the cases of a model.

    Each stage has one for each shape, end-to-end for each schedule too. The text encoder has one for each length of the
    prompt and knows no shape; the start-up is of the bundled model alone.
    """
    for index, shape in enumerate(selection.shapes_for(files.name)):
        for stage in selection.stages:
            if stage == TEXT:
                for tokens in () if index else selection.prompt_tokens:
                    yield StageCase(files, shape, stage, device, prompt_tokens=tokens)
            elif stage == END_TO_END:
                for schedule in selection.schedules:
                    yield StageCase(files, shape, stage, device, schedule)
            elif stage != STARTUP or files.name == DEMO:
                yield StageCase(files, shape, stage, device)


def measure_case(
    stage_case: StageCase, factories: Sequence[ContenderFactory], selection: Selection, log: LogFunction
) -> dict[str, Any]:
    """Returns the figures of one stage as plain data."""
    device = stage_case.device
    log(f"{stage_case}: reference")
    reference, reference_label = (
        _compute_reference(stage_case) if selection.compare_with_reference else (None, "not compared: --no-reference")
    )
    with ExitStack() as stack:
        contenders, skipped = _create_contenders(factories, stage_case, stack, log)
        yardsticks, notes = _create_yardsticks(contenders, stage_case, selection, stack)
        log(f"{stage_case}: {', '.join(contender.name for contender in (*contenders, *yardsticks))}")
        measurements, failed = measure(
            [*contenders, *yardsticks],
            rounds=min(selection.rounds, MAX_ROUNDS.get(stage_case.stage, selection.rounds)),
            warm_ups=WARM_UPS.get(device.type, 1),
            clock=host_clock if stage_case.stage == STARTUP else clock_for(device),
            peak=peak_memory_for(device),
            reference=reference,
        )
    gc.collect()
    return {
        **stage_case.identity,
        "tokens": stage_case.shape.grid.num_tokens,
        "flops": stage_case.flops,
        "reference": reference_label,
        "contenders": summarize(measurements, stage_case.flops),
        "skipped": [{"name": contender.name, "reason": contender.reason} for contender in (*skipped, *failed)],
        "notes": notes,
    }


def _create_yardsticks(
    contenders: Sequence[Contender], stage_case: StageCase, selection: Selection, stack: ExitStack
) -> tuple[list[Contender], list[str]]:
    """Returns a product of torch and the machine's peak for each dtype of products, and notes about them."""
    if stage_case.flops is None:
        return [], []
    device = stage_case.device
    side = selection.matmul_side or MATMUL_SIDES.get(device.type, MATMUL_SIDES["cpu"])
    dtypes = list(dict.fromkeys(contender.arithmetic for contender in contenders))
    peaks, notes = peak_yardsticks(dtypes, device, side, stack)
    return [*(matmul_yardstick(dtype, device, side) for dtype in dtypes), *peaks], notes


def _create_contenders(
    factories: Sequence[ContenderFactory], stage_case: StageCase, stack: ExitStack, log: LogFunction
) -> tuple[list[Contender], list[SkippedContender]]:
    contenders: list[Contender] = []
    skipped: list[SkippedContender] = []
    for factory in factories:
        for contender in factory(stage_case, stack):
            if isinstance(contender, SkippedContender):
                log(f"{stage_case}: {contender.name} is skipped")
                skipped.append(contender)
            else:
                log(f"{stage_case}: {contender.name} is ready")
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
