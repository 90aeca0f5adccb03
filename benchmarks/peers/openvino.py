"""Contenders of OpenVINO: the exported diffusers transformer, in the common dtype and with 8-bit weights by NNCF.

Only on CPUs: there OpenVINO is the engine to beat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openvino
import psutil
import torch
from torch import Tensor, nn

from benchmarks.peers import diffusers
from kadr.bench.runner import Contender, SkippedContender, error_line
from kadr.bench.stage_case import StageCase
from kadr.memory.device import free_bytes, trim_heap
from kadr.planning.costs.parameters import transformer_parameters

NAME = "OpenVINO"
HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class PositionalTransformer(nn.Module):
    """The transformer with positional arguments, as tracing needs them.

    RoPE's cosines and sines and the sinusoidal timestep embedding are arguments. Exported with the rest they would be
    computed in bfloat16, where angles in the thousands are wrong: the velocity is then 14 % off.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        del module.rope, module.time_embed.emb.time_proj

    def forward(
        self,
        tokens: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        cosine: Tensor,
        sine: Tensor,
        sinusoid: Tensor,
    ) -> Tensor:
        emb = self.module.time_embed.emb
        self.module.__dict__["rope"], emb.__dict__["time_proj"] = lambda *_: (cosine, sine), lambda _: sinusoid
        return self.module(tokens, prompt_embeds, sinusoid[:, :1], prompt_attention_mask, return_dict=False)[0]


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    if stage_case.device.type != "cpu":
        yield SkippedContender(NAME, "is measured on CPUs")
        return
    needed, free = 6 * transformer_parameters(stage_case.transformer_config).total, free_bytes(stage_case.device)
    if needed > 0.9 * free:
        yield SkippedContender(NAME, f"its export takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        return
    hint = HINTS[stage_case.dtype]
    # Exported from bfloat16, products with 8-bit weights would take four times as long.
    module = diffusers.load_transformer(stage_case).float()
    inputs = example_inputs(stage_case, module)
    exported = openvino.convert_model(PositionalTransformer(module), example_input=inputs)
    exported.reshape({port: list(tensor.shape) for port, tensor in zip(exported.inputs, inputs, strict=True)})
    yield create_contender(f"{NAME} {hint}", stage_case, exported, inputs)
    try:
        import nncf
    except ImportError as error:
        yield SkippedContender(f"{NAME} int8", f"not installed: {error_line(error)}")
        return
    logging.getLogger("nncf").setLevel(logging.ERROR)
    compressed = nncf.compress_weights(exported, mode=nncf.CompressWeightsMode.INT8_SYM)
    yield create_contender(f"{NAME} int8", stage_case, compressed, inputs)


def example_inputs(stage_case: StageCase, module: Any) -> tuple[Tensor, ...]:
    """Returns the arguments of `PositionalTransformer`, in float32."""
    inputs = stage_case.inputs
    cosine, sine = module.rope(inputs["tokens"], None, None, None, None, inputs["positions"])
    sinusoid = module.time_embed.emb.time_proj(inputs["sigma"].flatten() * 1000)
    mask = inputs["prompt_attention_mask"].float()
    return inputs["tokens"], inputs["prompt_embeds"], mask, cosine, sine, sinusoid


def create_contender(name: str, stage_case: StageCase, model: Any, inputs: tuple[Tensor, ...]) -> Contender:
    before = _resident_bytes()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[stage_case.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    contiguous = [tensor.contiguous() for tensor in inputs]
    for index, tensor in enumerate(contiguous):
        request.set_input_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))
    return Contender(
        name=name,
        run=_create_task(request, contiguous),
        dtype=str(stage_case.dtype).removeprefix("torch."),
        weight_bytes=max(0, _resident_bytes() - before),
        note="weights: growth of the process when the model was compiled, including room for activations",
    )


def _create_task(request: Any, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """Returns the task. It keeps `inputs` alive: the request reads their memory without owning it."""

    def run() -> Tensor:
        request.infer()
        assert inputs
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _resident_bytes() -> int:
    trim_heap()
    return int(psutil.Process().memory_info().rss)
