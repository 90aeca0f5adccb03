"""Writes random checkpoints of full size: `python -m benchmarks.full_size FOLDER [--model 13b]`.

Writes a 2B or 13B model of the 0.9.8 layout (bfloat16, official names and header; 6.3 or 28.6 GB) and a T5-XXL folder
(9.5 GB) beside it, tensor by tensor: no module is ever in memory. The weights are noise, scaled so that nothing
overflows: the model loads, runs and costs as the released one does, and generates noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sentencepiece
import torch

from kadr.bench.model_files import T5_XXL, TRANSFORMERS, RandomWeights
from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9_5
from kadr.sampling.schedules import Schedule

ALLOWED_SIGMAS = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
WORDS = ("a", "red", "circle", "moving", "right", "on", "the", "river", "while", "light", "follows", "an", "old", "man")


def train_tokenizer(folder: Path) -> Path:
    """Trains a small SentencePiece model with T5's special tokens; ids stay far below the encoder's vocabulary."""
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


def write_random_checkpoint(folder: Path, model: str = "2b") -> Path:
    """Writes a checkpoint and its text encoder, and returns the checkpoint's path. Existing files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path, random_weights = folder / f"random-{model}-0.9.8-distilled.safetensors", RandomWeights()
    if not path.exists():
        with torch.device("meta"):
            transformer, vae = Transformer(TRANSFORMERS[model]), VAE(VAE_0_9_5)
        schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=ALLOWED_SIGMAS)
        write_single_file(path, transformer=transformer, vae=vae, schedule=schedule, materialize=random_weights)
    if not (folder / "text_encoder" / "config.json").exists():
        with torch.device("meta"):
            encoder = T5Encoder(T5_XXL)
        write_text_encoder(folder, encoder, train_tokenizer(folder / "made"), materialize=random_weights)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=TRANSFORMERS, default="2b")
    options = parser.parse_args()
    began = time.monotonic()
    path = write_random_checkpoint(options.folder, options.model)
    print(f"{path}  ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
