"""The VAE keeps channels-last memory from end to end on a GPU, so that every fused kernel applies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kadr.models.vae import VAE
from kadr.models.vae.blocks import DepthToSpaceUpsample, ResnetBlock3D, SpaceToDepthDownsample
from kadr.nn.conv import ChunkedConv3d
from tests.fake_cuda.runtime import Runtime
from tests.oracles import VAES, narrow_vae_config
from tests.tiny_models import build_random

WATCHED = (ChunkedConv3d, ResnetBlock3D, DepthToSpaceUpsample, SpaceToDepthDownsample)


def build_vae(family: str) -> VAE:
    vae = build_random(lambda: VAE(narrow_vae_config(VAES[family], width=8, latent_channels=4)), seed=1)
    return vae.to("cuda").to(memory_format=torch.channels_last_3d).requires_grad_(False)


def watch_layouts(module: nn.Module) -> list[str]:
    """Returns a list that gets the name of each layer whose output is not channels last in memory."""
    found: list[str] = []

    def check(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if output.shape[2] and not output.movedim(1, -1).is_contiguous():
            found.append(type(layer).__name__)

    for layer in module.modules():
        if isinstance(layer, WATCHED):
            layer.register_forward_hook(check)
    return found


def count_blocks(module: nn.Module) -> int:
    return sum(isinstance(layer, ResnetBlock3D) for layer in module.modules())


@pytest.mark.parametrize("family", VAES)
def test_every_residual_block_of_an_encoder_uses_its_kernels(family: str, cuda: Runtime) -> None:
    vae = build_vae(family)
    found = watch_layouts(vae.encoder)
    vae.encode(torch.rand(1, 3, 17, 64, 96).to("cuda") * 2 - 1)
    assert not found
    blocks = count_blocks(vae.encoder)
    assert cuda.kernel_calls["pixel_norm_modulate_silu"] == 2 * blocks + 1  # two of a block, one before the last layer
    assert cuda.kernel_calls["bias_residual"] == blocks


@pytest.mark.parametrize("family", VAES)
def test_every_residual_block_of_a_decoder_uses_its_kernels(family: str, cuda: Runtime) -> None:
    vae = build_vae(family)
    found = watch_layouts(vae.decoder)
    timestep = torch.tensor([0.05], device="cuda") if vae.config.timestep_conditioning else None
    vae.decode(
        torch.randn(1, 4, 3, 2, 3).to("cuda"),
        timestep=timestep,
        noise_source=lambda shape: torch.randn(shape, device="cuda"),
    )
    assert not found
    blocks = count_blocks(vae.decoder)
    assert cuda.kernel_calls["pixel_norm_modulate_silu"] == 2 * blocks + 1
    assert cuda.kernel_calls["bias_residual"] == blocks
