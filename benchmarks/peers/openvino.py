"""Contenders of OpenVINO: the modules of diffusers and transformers, converted from PyTorch, in the common dtype.

The transformer also with 8-bit weights by NNCF. Only on CPUs: there OpenVINO is an engine to beat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openvino
import psutil
import torch
from torch import Tensor

from benchmarks.peers.traceable import TRACEABLES, Traceable
from kadr.bench.cases import DIT
from kadr.bench.runner import Contender, SkippedContender, error_line
from kadr.bench.stage_case import StageCase
from kadr.memory.device import free_bytes, trim_heap

NAME = "OpenVINO"
HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    if stage_case.device.type != "cpu":
        yield SkippedContender(NAME, "is measured on CPUs")
        return
    traceable = TRACEABLES[stage_case.stage](stage_case)
    if traceable.reason:
        yield SkippedContender(NAME, traceable.reason)
        return
    needed, free = 6 * traceable.parameters, free_bytes(stage_case.device)
    if needed > 0.9 * free:
        yield SkippedContender(NAME, f"its export takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        return
    module = traceable.load()
    # Traced at a small size, and given the real one afterwards: tracing runs the whole module in float32.
    exported = openvino.convert_model(module, example_input=traceable.inputs(module, is_example=True))
    inputs = traceable.inputs(module)
    exported.reshape({port: list(tensor.shape) for port, tensor in zip(exported.inputs, inputs, strict=True)})
    yield create_contender(f"{NAME} {HINTS[stage_case.dtype]}", stage_case, traceable, exported, inputs)
    if stage_case.stage != DIT:
        return
    try:
        import nncf
    except ImportError as error:
        yield SkippedContender(f"{NAME} int8", f"not installed: {error_line(error)}")
        return
    logging.getLogger("nncf").setLevel(logging.ERROR)
    compressed = nncf.compress_weights(exported, mode=nncf.CompressWeightsMode.INT8_SYM)
    yield create_contender(f"{NAME} int8", stage_case, traceable, compressed, inputs)


def create_contender(
    name: str, stage_case: StageCase, traceable: Traceable, model: Any, inputs: tuple[Tensor, ...]
) -> Contender:
    before = _resident_bytes()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[stage_case.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    # By default OpenVINO quantizes the activations too, in groups, where the weights have 8 bits.
    has_int8_products = name.endswith("int8") and compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") > 0
    contiguous = [tensor.contiguous() for tensor in inputs]
    for index, tensor in enumerate(contiguous):
        request.set_input_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))
    return Contender(
        name=name,
        run=_create_task(request, contiguous, traceable.finish),
        dtype=str(stage_case.dtype).removeprefix("torch."),
        weight_bytes=max(0, _resident_bytes() - before),
        products="int8" if has_int8_products else "",
        note="weights: growth of the process when the model was compiled, including room for activations",
    )


def _create_task(request: Any, inputs: list[Tensor], finish: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Returns the task. It keeps `inputs` alive: the request reads their memory without owning it."""

    def run() -> Tensor:
        request.infer()
        assert inputs
        return finish(torch.from_numpy(request.get_output_tensor(0).data))

    return run


def _resident_bytes() -> int:
    trim_heap()
    return int(psutil.Process().memory_info().rss)
