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
from kadr.bench.runner import Absent, Contender, told
from kadr.bench.stage_case import Work
from kadr.memory.device import free_bytes, trim_heap
from kadr.planning.parameters import transformer_parameters

NAME = "OpenVINO"
HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class Called(nn.Module):
    """The transformer with its arguments in a row, as tracing wants them.

    Rotations and the sinusoid of the noise level are arguments. Exported with the rest they would be computed in
    bfloat16 too, where angles of thousands are wrong: the velocity then is 14 % off.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        del module.rope, module.time_embed.emb.time_proj

    def forward(
        self, tokens: Tensor, text: Tensor, mask: Tensor, cosine: Tensor, sine: Tensor, sinusoid: Tensor
    ) -> Tensor:
        emb = self.module.time_embed.emb
        self.module.__dict__["rope"], emb.__dict__["time_proj"] = lambda *_: (cosine, sine), lambda _: sinusoid
        return self.module(tokens, text, sinusoid[:, :1], mask, return_dict=False)[0]


def enter(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
    if work.device.type != "cpu":
        yield Absent(NAME, "is measured on CPUs")
        return
    needed, free = 6 * transformer_parameters(work.transformer).total, free_bytes(work.device)
    if needed > 0.9 * free:
        yield Absent(NAME, f"to export it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        return
    hint = HINTS[work.dtype]
    module = diffusers.transformer(work).float()  # from bfloat16, products with weights in 8 bits run four times longer
    given = arguments(work, module)
    exported = openvino.convert_model(Called(module), example_input=given)
    exported.reshape({port: list(tensor.shape) for port, tensor in zip(exported.inputs, given, strict=True)})
    yield contender(f"{NAME} {hint}", work, exported, given)
    try:
        import nncf
    except ImportError as error:
        yield Absent(f"{NAME} int8", f"not installed: {told(error)}")
        return
    logging.getLogger("nncf").setLevel(logging.ERROR)
    small = nncf.compress_weights(exported, mode=nncf.CompressWeightsMode.INT8_SYM)
    yield contender(f"{NAME} int8", work, small, given)


def arguments(work: Work, module: Any) -> tuple[Tensor, ...]:
    """In the order of `Called`, in float32."""
    given = work.given
    cosine, sine = module.rope(given["tokens"], None, None, None, None, given["positions"])
    sinusoid = module.time_embed.emb.time_proj(given["level"].flatten() * 1000)
    return given["tokens"], given["text"], given["mask"].float(), cosine, sine, sinusoid


def contender(name: str, work: Work, model: Any, given: tuple[Tensor, ...]) -> Contender:
    before = _resident()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[work.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    kept = [tensor.contiguous() for tensor in given]
    for index, tensor in enumerate(kept):
        request.set_input_tensor(index, openvino.Tensor(tensor.numpy(), shared_memory=True))
    return Contender(
        name=name,
        run=_run(request, kept),
        dtype=str(work.dtype).removeprefix("torch."),
        weights=max(0, _resident() - before),
        note="weights: what the process grew by when the model was compiled, room for activations included",
    )


def _run(request: Any, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """inputs: the request reads their memory, and does not hold it."""

    def run() -> Tensor:
        request.infer()
        assert inputs
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _resident() -> int:
    trim_heap()
    return int(psutil.Process().memory_info().rss)
