"""Checkpoints of every kind, small enough to run in a test: random weights in the released layout, on disk.

    home = write_model(tmp_path, family="0.9.1")
    engine = kadr.Engine.open(home / MODEL_FILE)

The folder holds `model.safetensors`, `text_encoder` and `tokenizer`, where kadr, the official package and transformers
read them.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TypeVar

import sentencepiece
import torch
from torch import Tensor, nn

from kadr.checkpoints.save import write_single_file, write_text_encoder, write_upscaler
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE, VAEConfig
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5, BlockConfig
from kadr.sampling.schedules import Schedule

MODEL_FILE = "model.safetensors"
CHANNELS = 8
TEXT_WIDTH = 24
SENTENCE = "a red circle moving right over the blue sea while birds fly slowly through golden light of evening"
VAES = {"0.9": VAE_0_9, "0.9.1": VAE_0_9_1, "0.9.5": VAE_0_9_5}
LINEAR_QUADRATIC = Schedule(sampler="LinearQuadratic")
SHIFTED = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)

Module = TypeVar("Module", bound=nn.Module)


def vae_config(family: str) -> VAEConfig:
    """Returns the config of a released VAE with one layer per block and few channels."""

    def with_one_layer(blocks: tuple[BlockConfig, ...]) -> tuple[BlockConfig, ...]:
        return tuple(replace(block, num_layers=min(block.num_layers, 1)) for block in blocks)

    full = VAES[family]
    return replace(
        full,
        encoder_blocks=with_one_layer(full.encoder_blocks),
        decoder_blocks=with_one_layer(full.decoder_blocks),
        latent_channels=CHANNELS,
        encoder_base_channels=8,
        decoder_base_channels=8,
    )


def transformer_config(*, is_causal: bool = True, num_layers: int = 2) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        num_heads=4,
        head_dim=16,
        caption_channels=TEXT_WIDTH,
        in_channels=CHANNELS,
        causal_temporal_positioning=is_causal,
    )


def t5_config() -> T5Config:
    return T5Config(vocab_size=64, d_model=TEXT_WIDTH, num_layers=2, num_heads=3, d_kv=8, d_ff=40)


def build_random(build: Callable[[], Module], seed: int = 0) -> Module:
    """Builds a module with random numbers in every tensor, so that a swapped tensor is noticed; activations keep their
    scale from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        module = build().eval().requires_grad_(False)
    module.to_empty(device="cpu")
    for name, weight in module.state_dict().items():
        _fill_random(name.rpartition(".")[2], weight, generator)
    return module


def _fill_random(leaf: str, weight: Tensor, generator: torch.Generator) -> None:
    if leaf == "timestep_scale_multiplier":
        weight.fill_(900.0)  # not the released 1000, which code might hard-code
    elif leaf == "std" or (leaf == "weight" and weight.ndim == 1):
        weight.uniform_(0.5, 1.5, generator=generator)
    elif leaf == "weight":
        bound = (3 / prod(weight.shape[1:])) ** 0.5
        weight.uniform_(-bound, bound, generator=generator)
    else:  # biases, modulation tables, noise scales, latent means
        weight.normal_(std=0.3, generator=generator)


@cache
def sentencepiece_model() -> bytes:
    """Trains a unigram model with T5's ids for padding, end and unknown."""
    draw, words = random.Random(0), SENTENCE.split()
    lines = [" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


WeightEdit = Callable[[nn.Module], None]


def write_model(
    folder: Path,
    *,
    family: str = "0.9.5",
    is_causal: bool = True,
    num_layers: int = 2,
    schedule: Schedule = LINEAR_QUADRATIC,
    seed: int = 0,
    weight_edits: dict[str, WeightEdit] | None = None,
) -> Path:
    """Writes a whole model into a folder, which is created if absent, and returns the folder.

    Args:
        family: family of the VAE.
        is_causal: causal temporal positions, as from 0.9.5 on.
        num_layers: number of transformer blocks.
        weight_edits: "transformer", "vae" or "text encoder" -> a function that edits its weights before they are
            written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules: dict[str, nn.Module] = {
        "transformer": build_random(
            lambda: Transformer(transformer_config(is_causal=is_causal, num_layers=num_layers)), seed + 1
        ),
        "vae": build_random(lambda: VAE(vae_config(family)), seed + 2),
        "text encoder": build_random(lambda: T5Encoder(t5_config()), seed + 3),
    }
    for name, edit_weights in (weight_edits or {}).items():
        edit_weights(modules[name])
    write_single_file(
        folder / MODEL_FILE,
        transformer=modules["transformer"],
        vae=modules["vae"],
        schedule=schedule,
        dtype=torch.float32,
    )
    spiece = folder / "spiece.model"
    spiece.write_bytes(sentencepiece_model())
    write_text_encoder(folder, modules["text encoder"], spiece, dtype=torch.float32)
    spiece.unlink()
    return folder


def write_random_upscaler(
    path: Path, *, upscales_space: bool = True, upscales_time: bool = False, channels: int = CHANNELS
) -> Path:
    """Writes a latent upscaler with random weights, and returns its path."""
    config = UpscalerConfig(
        in_channels=channels,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=upscales_space,
        temporal_upsample=upscales_time,
    )
    write_upscaler(path, build_random(lambda: LatentUpscaler(config), 4))
    return path
