"""A random checkpoint of full size, to try what no small one can: `python -m benchmarks.full_size FOLDER`.

Writes a 2B model of the 0.9.8 layout (bfloat16, official names and header) and a T5-XXL folder beside it, 15 GB
together. The weights are noise, scaled so that nothing overflows: it loads and runs as the released model does and
costs the same, and shows noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, Transformer
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9_5
from kadr.sampling.schedule import Schedule

T5_XXL = T5Config(vocabulary=32128, width=4096, layers=24, heads=64, head_width=64, hidden=10240)
ALLOWED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
FILE = "random-2b-0.9.8-distilled.safetensors"
WORDS = ("a", "red", "circle", "moving", "right", "on", "the", "river", "while", "light", "follows", "an", "old", "man")


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """A module built on meta, filled with bfloat16 noise that keeps activations near their size."""
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith(("norm.weight", "deviation")):
            tensor.fill_(1.0)
        elif name.endswith("level_scale"):
            tensor.fill_(1000.0)
        elif tensor.ndim < 2:
            tensor.zero_()
        else:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)
    return module


def tokenizer(folder: Path) -> Path:
    """A small SentencePiece model with T5's special tokens; ids stay far below the encoder's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


def write(folder: Path) -> Path:
    """Write the checkpoint and its text encoder; returns the checkpoint's path. What is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    if not path.exists():
        with torch.device("meta"):
            transformer, vae = Transformer(TRANSFORMER_2B), VAE(VAE_0_9_5)
        write_single_file(
            path,
            transformer=randomised(transformer, 0),
            vae=randomised(vae, 1),
            schedule=Schedule(sampler="LinearQuadratic", allowed=ALLOWED),
        )
        del transformer, vae
    if not (folder / "text_encoder" / "config.json").exists():
        with torch.device("meta"):
            encoder = T5Encoder(T5_XXL)
        write_text_encoder(folder, randomised(encoder, 2), tokenizer(folder / "made"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("folder", type=Path)
    began = time.monotonic()
    path = write(parser.parse_args().folder)
    print(f"{path}  ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
