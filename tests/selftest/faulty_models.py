"""Copies of the demo with one fault each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kadr
from kadr.checkpoints.source import Source
from kadr.kernels.hadamard import hadamard_transform
from kadr.text.sentencepiece_model import parse_sentencepiece, serialize_sentencepiece

DEMO = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"
TEAL_LORA = DEMO.parent / "demo-lora-teal.safetensors"
BLOCKS = "model.diffusion_model.transformer_blocks"
FP8 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]


def rewrite(path: Path, change: Callable[[Tensors], object], *, source: Path = DEMO) -> Path:
    """Writes a copy of a file whose tensors were changed."""
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, dict(Source.open(source).metadata))
    return path


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    """Returns a change that swaps two tensors of the transformer's blocks."""
    a, b = (f"{BLOCKS}.{name}.weight" for name in (first, second))

    def change(tensors: Tensors) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def put_nan(tensors: Tensors) -> None:
    tensors[f"{BLOCKS}.3.ff.net.2.weight"][7, 11] = torch.nan


def scale_latent_statistics(tensors: Tensors) -> None:
    tensors["vae.per_channel_statistics.std-of-means"] *= 4


def rotate_fp8_weights(tensors: Tensors) -> None:
    """Rotates the weights and stores them in fp8 with scales, which kadr does not take for rotated ones."""
    for name in [name for name in tensors if name.startswith(BLOCKS) and name.endswith(".weight")]:
        if tensors[name].ndim == 2:
            tensors[name] = hadamard_transform(tensors[name].float(), 64).to(FP8)
            tensors[name.removesuffix("weight") + "scale_weight"] = torch.ones(())


def scramble_decoder_channels(tensors: Tensors) -> None:
    """Transposes rows and columns of each patch of 8x8 pixels."""
    order = torch.arange(192).view(3, 8, 8).transpose(1, 2).flatten()
    for part in ("weight", "bias"):
        name = f"vae.decoder.conv_out.conv.{part}"
        tensors[name] = tensors[name][order].contiguous()


def empty_half_of_lora(tensors: Tensors) -> None:
    for index in range(4, 8):
        for name in [name for name in tensors if f"blocks.{index}." in name and "lora_B" in name]:
            tensors[name].zero_()


def drop_half_of_lora(tensors: Tensors) -> None:
    for name in [name for name in tensors if any(f"blocks.{index}." in name for index in range(4, 8))]:
        del tensors[name]


def empty_text_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("encoder.block.1.")]:
        tensors[name].zero_()


def drop_text_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("encoder.block.1.")]:
        del tensors[name]


def copy_text_encoder(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
    """Copies the text encoder and its tokenizer, and changes tensors of the encoder."""
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(DEMO.parent / name, folder / name)
    weights = folder / "text_encoder" / "model.safetensors"
    rewrite(weights, change, source=DEMO.parent / "text_encoder" / "model.safetensors")
    return folder


def shift_token_ids(folder: Path) -> Path:
    """Moves the last piece of the vocabulary before all others but the markers: every id grows by one."""
    file = folder / "tokenizer" / "spiece.model"
    model = parse_sentencepiece(file.read_bytes())
    order = (0, 1, 2, len(model.pieces) - 1, *range(3, len(model.pieces) - 1))
    pieces, scores, types = (
        tuple(values[index] for index in order) for values in (model.pieces, model.scores, model.types)
    )
    file.write_bytes(serialize_sentencepiece(replace(model, pieces=pieces, scores=scores, types=types)))
    return folder
