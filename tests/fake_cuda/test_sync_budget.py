"""The host never waits for the GPU during a denoising step or between chunks of the decoder.

Each wait leaves the GPU without work until the host has launched more. The first steps of a request are not counted:
they try kernels, and record and check a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from kadr.kernels import mode
from kadr.nn.attention import Attention
from kadr.pipeline.progress import Progress
from kadr.request.request import Request
from tests.fake_cuda.modes import GUIDANCE, TEAL_LORA, build_request, open_engine
from tests.fake_cuda.runtime import Runtime
from tests.fake_cuda.watch import DeviceWatch, Wait, describe

FIRST_STEADY_STEP = 4  # the third records the graph
IMAGE = {"conditions": [("IMAGE", 0, 1.0)], "image_noise": 0.15}
BUDGETED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text to video": ({}, {}),
    "image to video": (IMAGE, {}),
    "keyframes": ({"conditions": [("IMAGE", 0, 0.7), ("IMAGE", 16, 0.4)], "image_noise": 0.15}, {}),
    "clip in the middle": ({"conditions": [("CLIP", 8, 0.8)]}, {}),
    "guidance": (IMAGE | {"guidance": GUIDANCE}, {}),
    "guidance in one batch": (IMAGE | {"guidance": GUIDANCE, "guidance_batch": True}, {}),
    "stochastic": (IMAGE | {"sampler": "euler_stochastic"}, {}),
    "RES 2S": (IMAGE | {"sampler": "res_2s"}, {}),
    "LoRA": (IMAGE, {"loras": [TEAL_LORA]}),
    "bfloat16": (IMAGE, {"dtype": "bfloat16"}),
    "int8": (IMAGE, {"quant": "int8"}),
    "fp8": (IMAGE, {"quant": "fp8", "dtype": "bfloat16"}),
    "Q8_0": (IMAGE, {"quant": "Q8_0"}),
    "blocks": (IMAGE, {"offload": "blocks"}),
    "int8 blocks": (IMAGE, {"offload": "blocks", "quant": "int8"}),
}


def waits_by_step(cuda: Runtime, request: Request, engine: dict[str, Any]) -> dict[tuple[str, int], list[Wait]]:
    """Generates, and returns the waits of the host up to the end of each step, by stage and step."""
    waits: dict[tuple[str, int], list[Wait]] = {}

    def close_step(progress: Progress) -> None:
        waits[progress.stage, progress.step] = list(watch.waits)
        watch.waits.clear()

    with DeviceWatch(cuda) as watch:
        open_engine("cuda", engine).generate(request, watch=close_step)
    return waits


def steady_waits(waits: dict[tuple[str, int], list[Wait]], first: int = FIRST_STEADY_STEP) -> list[Wait]:
    steps = [step for stage, step in waits if stage == "denoise" and step >= first]
    assert len(steps) >= 3
    return [wait for step in steps for wait in waits["denoise", step]]


@pytest.mark.parametrize("name", BUDGETED)
def test_a_denoising_step_never_waits_for_the_gpu(name: str, cuda: Runtime, media: dict[str, str]) -> None:
    request, engine = BUDGETED[name]
    waits = steady_waits(waits_by_step(cuda, build_request(request, media), engine))
    assert not waits, describe(waits)


@pytest.mark.parametrize("name", ["text to video", "image to video", "stochastic"])
def test_plain_kernels_never_wait_from_the_second_step_on(name: str, cuda: Runtime, media: dict[str, str]) -> None:
    request, engine = BUDGETED[name]
    with mode.override(mode.REFERENCE):
        waits = steady_waits(waits_by_step(cuda, build_request(request, media), engine), first=2)
    assert not waits, describe(waits)


def test_an_item_in_a_layer_breaks_the_budget(
    cuda: Runtime, media: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project_qkv = Attention._project_qkv

    def wasteful(self: Attention, x: Tensor, *others: Any) -> Any:
        assert x.sum().item() is not None
        return project_qkv(self, x, *others)

    monkeypatch.setattr(Attention, "_project_qkv", wasteful)
    with mode.override(mode.REFERENCE):
        waits = steady_waits(waits_by_step(cuda, build_request({}, media), {}), first=2)
    assert {wait.kind for wait in waits} == {"reads a value"}
    assert "nn/attention.py" in describe(waits)
    with pytest.warns(UserWarning, match="CUDA graph capture failed"):
        assert steady_waits(waits_by_step(cuda, build_request({}, media), {}))


def test_the_decoder_waits_for_a_chunk_while_the_next_is_queued(
    cuda: Runtime, media: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kadr.planning.options.vae.LARGE_CHUNK_FRAMES", ())  # several chunks of a short video
    waits = waits_by_step(cuda, build_request({"frames": 65, "steps": 2}, media), {})
    chunks = [step for stage, step in waits if stage == "decode"]
    assert len(chunks) > 4
    between = [wait for step in chunks[2:-1] for wait in waits["decode", step]]
    assert not between, describe(between)
