"""Every mode of a generation runs on an emulated GPU, and gives the video that the CPU gives.

Numbers are real: a tensor on the wrong device, a wrong dtype, a stale CUDA graph or a lost copy would show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kadr.kernels import trial
from tests.fake_cuda.modes import GUIDANCE, TEAL_LORA, build_request, open_engine
from tests.fake_cuda.runtime import Runtime
from tests.fake_cuda.watch import DeviceWatch

FP32_ERROR, BF16_ERROR, INT8_ERROR, FP8_ERROR = 1e-4, 0.1, 0.05, 0.1  # relative, of the latents


@dataclass(frozen=True)
class Case:
    """One mode.

    Args:
        request: options of the request; see `build_request`.
        engine: options of `Engine.open`.
        max_error: of the latents against those of the CPU.
        on_cpu: other options there.
    """

    request: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    max_error: float = FP32_ERROR
    on_cpu: dict[str, Any] = field(default_factory=dict)


BF16 = {"dtype": "bfloat16"}
FP8_ON_CPU = {"quant": "fp8-weights"}  # a CPU has no fp8 matmuls
RESIDENT = {"offload": "auto"}
CASES = {
    "text to video": Case(),
    "image to video": Case({"conditions": [("IMAGE", 0, 1.0)], "image_noise": 0.15}),
    "clip": Case({"conditions": [("CLIP", 0, 1.0)]}),
    "keyframes": Case({"conditions": [("IMAGE", 0, 0.7), ("IMAGE", 16, 1.0)], "image_noise": 0.15}),
    "clip in the middle": Case({"conditions": [("CLIP", 8, 0.8)]}),
    "guidance": Case({"guidance": GUIDANCE}),
    "guidance in one batch": Case({"guidance": GUIDANCE, "guidance_batch": True}),
    "two passes": Case({"multi_scale": True}),
    "odd size": Case({"size": (100, 76), "frames": 12}),
    "stochastic": Case({"sampler": "euler_stochastic"}),
    "RES 2S with an image": Case({"sampler": "res_2s", "conditions": [("IMAGE", 0, 0.9)], "image_noise": 0.15}),
    "step cache": Case({"cache": "first-block", "steps": 12}),
    "long video": Case({"frames": 49, "windows": {"frames": 33, "overlap": 8}, "steps": 4}),
    "LoRA": Case({}, {"loras": [TEAL_LORA]}),
    "bfloat16": Case({}, BF16, BF16_ERROR),
    "int8": Case({}, {"quant": "int8"}, INT8_ERROR),
    "fp8": Case({}, {"quant": "fp8"} | BF16, FP8_ERROR, FP8_ON_CPU),
    "fp8 in float32": Case({}, {"quant": "fp8"}, FP8_ERROR, FP8_ON_CPU),
    "Q8_0": Case({}, {"quant": "Q8_0"}),
    "blocks": Case({}, {"offload": "blocks"}, FP32_ERROR, RESIDENT),
    "int8 blocks": Case({}, {"offload": "blocks", "quant": "int8"}, INT8_ERROR, RESIDENT),
    "Q8_0 blocks with a LoRA": Case(
        {},
        {"offload": "blocks", "quant": "Q8_0", "loras": [TEAL_LORA]},
        FP32_ERROR,
        RESIDENT,
    ),
    "stages": Case({}, {"offload": "stages"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mode_gives_the_video_of_the_cpu(name: str, cuda: Runtime, media: dict[str, str]) -> None:
    case = CASES[name]
    request = build_request(case.request, media)
    expected = open_engine("cpu", {**case.engine, **case.on_cpu}).generate(request)
    with DeviceWatch(cuda) as watch:
        video = open_engine("cuda", case.engine).generate(request)
    error = float((video.latents - expected.latents).norm() / expected.latents.norm())
    assert error <= case.max_error
    assert np.abs(video.frames.astype(int) - expected.frames).mean() <= 1 + 100 * case.max_error
    assert not watch.races
    assert cuda.kernel_calls["norm_rope"]
    is_graphed = case.engine.get("offload") != "blocks" and "cache" not in case.request
    assert bool(cuda.replays) == is_graphed
    assert None not in trial._verdicts.values()  # no kernel was rejected
