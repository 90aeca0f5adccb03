"""Measures the peak memory of components at work, beside the prediction: prints one JSON object."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace

import torch

from kadr.kernels.cpu.winograd import F23, F43
from kadr.kernels.matmul import has_bf16_units
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9_5
from kadr.planning.costs import activations
from kadr.planning.costs.vae_activations import vae_decode_activation_bytes, vae_encode_activation_bytes
from kadr.quant.prepack import prepack_convs, should_prepack_linears
from kadr.shapes import LatentGrid

WIDE = TransformerConfig(num_layers=2, num_heads=16, head_dim=64, caption_channels=512)
WIDE_T5 = T5Config(vocab_size=100, d_model=2048, num_layers=2, num_heads=32, d_kv=64, d_ff=5120)
CPU = torch.device("cpu")
THIN_VAE = replace(VAE_0_9_5, encoder_base_channels=32, decoder_base_channels=32)
GRID = LatentGrid(3, 8, 12)


def status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def peak_growth(task: Callable[[], object]) -> int:
    """Returns the peak growth of the process in bytes during a task, which runs twice: the first run loads kernels."""
    task()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # resets the peak to the present size
    before = status_bytes("VmRSS")
    task()
    return status_bytes("VmHWM") - before


def transformer(dtype: torch.dtype, tokens: int, *, per_token: bool = False) -> list[int]:
    module = Transformer(WIDE).to(dtype)
    rope, mask = module.compute_rope(torch.rand(1, 3, tokens)), torch.arange(256)[None] < 20
    x, text = torch.randn(1, tokens, 128, dtype=dtype), torch.randn(1, 256, 512, dtype=dtype)
    sigma = torch.full((1, tokens if per_token else 1), 0.5)
    predicted = activations.transformer_activation_bytes(
        WIDE,
        tokens,
        dtype.itemsize,
        text_tokens=20,
        per_token_sigmas=per_token,
        fused_gelu=should_prepack_linears(dtype, CPU),
    )
    predicted += activations.text_kv_bytes(WIDE, dtype.itemsize, text_tokens=20)
    return [peak_growth(lambda: module(x, rope, text, mask, sigma)), predicted]


def text_encoder() -> list[int]:
    module, ids = T5Encoder(WIDE_T5).bfloat16(), torch.zeros(1, 256, dtype=torch.int64)
    predicted = activations.text_encoder_activation_bytes(WIDE_T5, 2, length=256, padded_length=256)
    return [peak_growth(lambda: module(ids, ids == 0)), predicted]


def decoder(dtype: torch.dtype, *, winograd_frames: int = 0) -> list[int]:
    module, latents = VAE(THIN_VAE).to(dtype), torch.randn(1, 128, GRID.frames, GRID.height, GRID.width, dtype=dtype)
    if winograd_frames:
        prepack_convs(module, winograd_frames=winograd_frames)

    def decode() -> None:
        for _ in module.decode_stream(latents, timestep=torch.tensor([0.05])):
            pass

    return [
        peak_growth(decode),
        vae_decode_activation_bytes(THIN_VAE, GRID, dtype.itemsize, winograd_frames=winograd_frames),
    ]


def encoder(*, winograd_frames: int = 0) -> list[int]:
    pixels = torch.randn(1, 3, GRID.video_frames, 32 * GRID.height, 32 * GRID.width)
    module = VAE(THIN_VAE)
    if winograd_frames:
        prepack_convs(module, winograd_frames=winograd_frames)
    return [
        peak_growth(lambda: module.encode(pixels, chunk_frames=8)),
        vae_encode_activation_bytes(THIN_VAE, GRID, 4, winograd_frames=winograd_frames),
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        report = {
            "transformer": transformer(torch.bfloat16, 1024),
            "transformer in float32": transformer(torch.float32, 512),
            "conditioned": transformer(torch.float32, 512, per_token=True),
            "text": text_encoder(),
            "decoder in float32": decoder(torch.float32),
            "encoder": encoder(),
            "packed decoder in float32": decoder(torch.float32, winograd_frames=F43),
            "packed encoder": encoder(winograd_frames=F23),
        }
        if has_bf16_units():  # elsewhere oneDNN has no convolution in bfloat16, and one of torch takes minutes
            report |= {
                "decoder": decoder(torch.bfloat16),
                "packed decoder": decoder(torch.bfloat16, winograd_frames=F43),
                "decoder packed for pairs": decoder(torch.bfloat16, winograd_frames=F23),
            }
    print(json.dumps(report))
