"""On a GPU: the same noise, and so the same video up to rounding."""

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
    exact = Engine.open("demo", device="cuda", dtype="float32").generate(REQUEST)
    narrow = Engine.open("demo", device="cuda", dtype="bfloat16").generate(REQUEST)
    assert np.abs(exact.frames.astype(int) - narrow.frames.astype(int)).mean() < 12


def test_looking_for_numbers_that_are_none_does_not_wait_for_the_device() -> None:
    watchman, x = FiniteCheck.for_device(torch.device("cuda")), torch.ones(1000, 128, device="cuda")
    for warm in range(3):  # the first answers allocate memory on the host
        watchman.check(x, f"step {warm}")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 9):
            watchman.check(x, f"step {step}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watchman.check(x / 0, "step 9")
    with pytest.raises(NonFiniteFound, match="step 9"):
        watchman.check(x, "step 10")


@pytest.mark.parametrize("pinned", [False, True])
def test_blocks_that_pass_through_two_places_compute_as_blocks_that_stay(pinned: bool) -> None:
    from kadr.memory.block_swap import BlockSwapper

    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(7)).requires_grad_(False)
    x = torch.randn(64, 512, device="cuda")

    def through() -> torch.Tensor:
        made = x
        for block in blocks:
            made = torch.tanh(block(made))
        return made

    blocks.to("cuda")
    right = through()
    blocks.to("cpu")
    carousel = BlockSwapper(list(blocks), torch.device("cuda"), pin_memory=pinned)
    for _ in range(3):
        torch.testing.assert_close(through(), right)
    assert len(carousel.slots) == 2


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8", "fp8-weights", "Q8_0", "Q4_0"])
def test_weights_are_rounded_on_the_gpu_as_on_the_cpu(scheme: str) -> None:
    from kadr.quant.convert import quantize_blocks
    from tests.quant.test_convert import answer, apart, made

    here, there = made(), made()
    quantize_blocks(here, scheme, device=torch.device("cpu"))
    quantize_blocks(there, scheme, device=torch.device("cuda"))
    assert apart(answer(there.to("cpu")), answer(here)) < 1e-3


@pytest.mark.parametrize("scheme", [None, "int8", "fp8", "Q8_0"])
def test_compiled_layers_give_what_the_plain_ones_give(scheme: str | None) -> None:
    plain, compiled = (
        Engine.open("demo", device="cuda", dtype="float32", quant=scheme, compile_transformer=c).generate(REQUEST)
        for c in (False, True)
    )
    error = (compiled.latents - plain.latents).norm() / plain.latents.norm()
    assert error < (1e-3 if scheme is None else 0.02)


def test_videos_keep_their_channels_last_through_the_vae() -> None:
    engine = Engine.open("demo", device="cuda", dtype="bfloat16")
    engine.components.apply_plan(engine.plan(REQUEST))
    seen = 0

    def lies_last(layer: torch.nn.Module, given: object, made: torch.Tensor) -> None:
        nonlocal seen
        seen += 1
        assert not made.shape[2] or made.movedim(1, -1).is_contiguous(), type(layer).__name__

    with engine.components.vae_decoder() as vae, torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, ChunkedConv3d | ResnetBlock3D | DepthToSpaceUpsample):
                layer.register_forward_hook(lies_last)
        latents = torch.randn(1, vae.config.latent_channels, 3, 4, 4, device="cuda", dtype=torch.bfloat16)
        level = torch.tensor([0.05], device="cuda")
        assert sum(part.shape[2] for part in vae.decode_stream(latents, timestep=level)) == 17
    assert seen > 10
