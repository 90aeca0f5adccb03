"""The diffusers transformer exported to OpenVINO: in the dtype of the others, and with weights in 8 bits by NNCF.

Only on CPUs: that is where it is the one to beat.
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
from kadr.planning.parameters import transformer_parameters

NAME = "OpenVINO"
HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class PositionalTransformer(nn.Module):
    """The transformer with its arguments in a row, as tracing wants them.

    Rotations and the sinusoid of the noise level are arguments. Exported with the rest they would be computed in
    bfloat16 too, where angles of thousands are wrong: the velocity then is 14 % off.
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
        yield SkippedContender(NAME, f"to export it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        return
    hint = HINTS[stage_case.dtype]
    module = diffusers.load_transformer(
        stage_case
    ).float()  # from bfloat16, products with weights in 8 bits run four times longer
    given = example_inputs(stage_case, module)
    exported = openvino.convert_model(PositionalTransformer(module), example_input=given)
    exported.reshape({port: list(tensor.shape) for port, tensor in zip(exported.inputs, given, strict=True)})
    yield create_contender(f"{NAME} {hint}", stage_case, exported, given)
    try:
        import nncf
    except ImportError as error:
        yield SkippedContender(f"{NAME} int8", f"not installed: {error_line(error)}")
        return
    logging.getLogger("nncf").setLevel(logging.ERROR)
    small = nncf.compress_weights(exported, mode=nncf.CompressWeightsMode.INT8_SYM)
    yield create_contender(f"{NAME} int8", stage_case, small, given)


def example_inputs(stage_case: StageCase, module: Any) -> tuple[Tensor, ...]:
    """In the order of `PositionalTransformer`, in float32."""
    given = stage_case.inputs
    cosine, sine = module.rope(given["tokens"], None, None, None, None, given["positions"])
    sinusoid = module.time_embed.emb.time_proj(given["level"].flatten() * 1000)
    return given["tokens"], given["text"], given["mask"].float(), cosine, sine, sinusoid


def create_contender(name: str, stage_case: StageCase, model: Any, inputs: tuple[Tensor, ...]) -> Contender:
    before = _resident_bytes()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[stage_case.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    kept = [tensor.contiguous() for tensor in inputs]
    for index, tensor in enumerate(kept):
        request.set_input_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))
    return Contender(
        name=name,
        run=_create_task(request, kept),
        dtype=str(stage_case.dtype).removeprefix("torch."),
        weight_bytes=max(0, _resident_bytes() - before),
        note="weights: what the process grew by when the model was compiled, room for activations included",
    )


def _create_task(request: Any, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """inputs: the request reads their memory, and does not hold it."""

    def run() -> Tensor:
        request.infer()
        assert inputs
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _resident_bytes() -> int:
    trim_heap()
    return int(psutil.Process().memory_info().rss)
