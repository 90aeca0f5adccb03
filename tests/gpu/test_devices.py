"""On a GPU the noise is the same, and so is the video up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kadr import Engine, Request
from kadr.models.vae.blocks import DepthToSpaceUpsample, ResnetBlock3D
from kadr.nn.conv import ChunkedConv3d
from kadr.pipeline.finite_check import FiniteCheck, NonFiniteFound

pytestmark = pytest.mark.gpu
REQUEST = Request(prompt="a blue square moving left on a gray background", seed=5)


def test_a_seed_gives_the_same_video_on_both_devices() -> None:
    on_cpu = Engine.open("demo", device="cpu", dtype="float32").generate(REQUEST)
    on_gpu = Engine.open("demo", device="cuda", dtype="float32").generate(REQUEST)
    error = (on_cpu.latents - on_gpu.latents).norm() / on_cpu.latents.norm()
    assert error < 1e-3
    assert np.abs(on_cpu.frames.astype(int) - on_gpu.frames.astype(int)).mean() < 1


def test_bfloat16_on_a_gpu_stays_finite_and_close() -> None:
    fp32 = Engine.open("demo", device="cuda", dtype="float32").generate(REQUEST)
    bf16 = Engine.open("demo", device="cuda", dtype="bfloat16").generate(REQUEST)
    assert np.abs(fp32.frames.astype(int) - bf16.frames.astype(int)).mean() < 12


def test_the_finite_check_does_not_synchronize_the_device() -> None:
    finite_check, x = FiniteCheck.for_device(torch.device("cuda")), torch.ones(1000, 128, device="cuda")
    for step in range(3):  # the first results allocate host memory
        finite_check.check(x, f"step {step}")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 9):
            finite_check.check(x, f"step {step}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finite_check.check(x / 0, "step 9")
    with pytest.raises(NonFiniteFound, match="step 9"):
        finite_check.check(x, "step 10")


@pytest.mark.parametrize("pinned", [False, True])
def test_swapped_blocks_compute_as_resident_ones(pinned: bool) -> None:
    from kadr.memory.block_swap import BlockSwapper

    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(7)).requires_grad_(False)
    x = torch.randn(64, 512, device="cuda")

    def run_blocks() -> torch.Tensor:
        output = x
        for block in blocks:
            output = torch.tanh(block(output))
        return output

    blocks.to("cuda")
    expected = run_blocks()
    blocks.to("cpu")
    swapper = BlockSwapper(list(blocks), torch.device("cuda"), pin_memory=pinned)
    for _ in range(3):
        torch.testing.assert_close(run_blocks(), expected)
    assert len(swapper.slots) == 2


@pytest.mark.parametrize("weight_format", ["int8", "int8-weights", "fp8", "fp8-weights", "Q8_0", "Q4_0"])
def test_quantization_on_the_gpu_equals_that_on_the_cpu(weight_format: str) -> None:
    from kadr.quant.convert import quantize_blocks
    from tests.quant.test_convert import build_transformer, predict, relative_error

    on_cpu, on_gpu = build_transformer(), build_transformer()
    quantize_blocks(on_cpu, weight_format, device=torch.device("cpu"))
    quantize_blocks(on_gpu, weight_format, device=torch.device("cuda"))
    assert relative_error(predict(on_gpu.to("cpu")), predict(on_cpu)) < 1e-3


@pytest.mark.parametrize("weight_format", [None, "int8", "fp8", "Q8_0"])
def test_compiled_blocks_equal_the_plain_ones(weight_format: str | None) -> None:
    plain, compiled = (
        Engine.open("demo", device="cuda", dtype="float32", quant=weight_format, compile_transformer=compiles).generate(
            REQUEST
        )
        for compiles in (False, True)
    )
    error = (compiled.latents - plain.latents).norm() / plain.latents.norm()
    assert error < (1e-3 if weight_format is None else 0.02)


def test_the_vae_keeps_channels_last_memory_throughout() -> None:
    engine = Engine.open("demo", device="cuda", dtype="bfloat16")
    checked = 0

    def assert_channels_last(layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal checked
        checked += 1
        assert not output.shape[2] or output.movedim(1, -1).is_contiguous(), type(layer).__name__

    with engine.start(REQUEST) as generation, generation.modules.vae_decoder() as vae, torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, ChunkedConv3d | ResnetBlock3D | DepthToSpaceUpsample):
                layer.register_forward_hook(assert_channels_last)
        latents = torch.randn(1, vae.config.latent_channels, 3, 4, 4, device="cuda", dtype=torch.bfloat16)
        timestep = torch.tensor([0.05], device="cuda")
        assert sum(chunk.shape[2] for chunk in vae.decode_stream(latents, timestep=timestep)) == 17
    assert checked > 10
