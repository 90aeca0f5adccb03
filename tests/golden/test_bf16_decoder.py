"""The demo's decoder in bfloat16 by each kind of convolution: how far it is from float32, as docs/parity.md says.

oneDNN's bfloat16 convolution (operands in bfloat16, sums in float32, one rounding) is replaced by the same arithmetic
in float32, so that this runs on CPUs without units for bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ltx_video.models.autoencoders.vae_encode import un_normalize_latents
from torch import Tensor

import kadr
from kadr import Engine, Request
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.kernels.cpu import winograd
from kadr.models.vae import VAE
from kadr.quant.prepack import prepack_convs
from tests.oracles import official_vae, relative_error

DEMO = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"
REQUEST = Request(prompt="a red circle moving right on a black background", size=(128, 128), frames=9, steps=8, seed=0)


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Computes convolutions in bfloat16 as a CPU with units for it does."""
    conv3d = F.conv3d

    def conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        images = winograd._frames_as_batch(x).float()
        output = F.conv2d(images, kernel.float(), None if bias is None else bias.float(), padding=1)
        if residual is not None:
            output = output + winograd._frames_as_batch(residual).float()
        return output.to(x.dtype).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])

    def rounded_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor:
        output = conv3d(x.float(), weight.float(), None if bias is None else bias.float(), *args)
        return output.to(x.dtype)

    monkeypatch.setattr(winograd, "_conv2d", conv2d)
    monkeypatch.setattr(winograd, "prepack_kernel", lambda kernel, *_: kernel)
    monkeypatch.setattr(F, "conv3d", rounded_conv3d)
    with torch.no_grad():
        yield


def test_bf16_decoder_by_winograd_is_as_far_from_fp32_as_published(bf16_units: None) -> None:
    checkpoint, engine = Checkpoint.open(DEMO), Engine.open("demo", device="cpu", prompt_cache=False)
    latents, timestep = engine.denoise(REQUEST), torch.full((1,), 0.05)
    exact = checkpoint.load_vae(dtype=torch.float32).decode(latents, timestep=timestep).clamp(-1, 1)

    def error(vae: VAE) -> float:
        return relative_error(vae.decode(latents.bfloat16(), timestep=timestep).float().clamp(-1, 1), exact)

    plain = checkpoint.load_vae(dtype=torch.bfloat16)
    errors = {0: error(plain)}
    for frames in (winograd.F23, winograd.F43):
        prepacked = deepcopy(plain)
        prepack_convs(prepacked.decoder, winograd_frames=frames)
        errors[frames] = error(prepacked)
    oracle = official_vae(plain)
    raw = un_normalize_latents(latents.bfloat16(), oracle, vae_per_channel_normalize=True)
    pixels = oracle.decode(raw, target_shape=raw.shape, timestep=timestep, return_dict=False)[0]
    official = relative_error(pixels.float().clamp(-1, 1), exact)
    assert 0.9 * official <= errors[0] <= 1.15 * official
    assert errors[0] < errors[winograd.F23] < errors[winograd.F43] <= 1.75 * official
