"""Runs the stages of a self-test, in order, each to the end: one that fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from kadr.cancellation import check_cancelled
from kadr.errors import Cancelled, KadrError
from kadr.kernels.error_kinds import is_fatal_cuda_error
from kadr.pipeline.engine import Engine
from kadr.quoting import one_line
from kadr.selftest.report import build_report
from kadr.selftest.result import Check, NotRun, SelftestReport, StageResult
from kadr.selftest.stages.files import check_files
from kadr.selftest.stages.kernels import check_kernels
from kadr.selftest.stages.layers import check_layers
from kadr.selftest.stages.loras import check_loras
from kadr.selftest.stages.placements import check_placements
from kadr.selftest.stages.sample import check_sample
from kadr.selftest.stages.text_encoder import check_text_encoder, check_tokenizer
from kadr.selftest.stages.transformer import check_transformer
from kadr.selftest.stages.upscaler import check_upscaler
from kadr.selftest.stages.vae import check_vae
from kadr.selftest.stages.weights import check_weights
from kadr.selftest.subject import Subject

Stage = Callable[[Subject], Iterator[Check]]
# What later stages rest on comes first: the first one that fails names the fault.
SELFTEST_STAGES: Mapping[str, Stage] = {
    "files": check_files,
    "weights": check_weights,
    "kernels": check_kernels,
    "tokenizer": check_tokenizer,
    "text encoder": check_text_encoder,
    "VAE": check_vae,
    "linear layers": check_layers,
    "transformer": check_transformer,
    "LoRAs": check_loras,
    "upscaler": check_upscaler,
    "placements": check_placements,
    "sample": check_sample,
}


def run_selftest(
    engine: Engine,
    *,
    stages: Mapping[str, Stage] = SELFTEST_STAGES,
    begin: Callable[[str], object] = lambda name: None,
    end: Callable[[StageResult], object] = lambda result: None,
) -> SelftestReport:
    """Tests a model on this device.

    Args:
        engine: of the model, opened without a prompt cache; what is not on disk is fetched.
        stages: those to run, in this order.
        begin, end: called before each stage with its name, and after it with its result.

    Returns:
        The report. A stage that raises an error fails with its message, and the next one begins.

    Raises:
        Cancelled: the work was cancelled.
    """
    subject, results = Subject(engine), []
    for name, stage in stages.items():
        check_cancelled()
        begin(name)
        results.append(_run_stage(name, stage, subject))
        end(results[-1])
    return build_report(subject, tuple(results))


def _run_stage(name: str, stage: Stage, subject: Subject) -> StageResult:
    start, checks, problem, was_run = time.perf_counter(), [], "", True
    try:
        with torch.no_grad():
            for check in stage(subject):
                checks.append(check)
    except NotRun as reason:
        problem, was_run = str(reason), False
    except Cancelled:
        raise
    except KadrError as error:
        problem = str(error)
    except Exception as error:  # of kernels, drivers and libraries: what this test is to find
        if is_fatal_cuda_error(error):
            raise
        problem = f"{type(error).__name__}: {one_line(error)}"
    return StageResult(name, tuple(checks), time.perf_counter() - start, problem, was_run)
