"""Random checkpoints of full size, to try what no small one can: `python -m benchmarks.full_size FOLDER [--model 13b]`.

Writes a 2B or 13B model of the 0.9.8 layout (bfloat16, official names and header; 6.3 or 28.6 GB) and a T5-XXL folder
(9.5 GB) beside it, tensor by tensor: no module is ever in memory. The weights are noise, scaled so that nothing
overflows: it loads and runs as the released model does and costs the same, and shows noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from zlib import crc32

import sentencepiece
import torch
from torch import Tensor

from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9_5
from kadr.sampling.schedule import Schedule

T5_XXL = T5Config(vocabulary=32128, width=4096, layers=24, heads=64, head_width=64, hidden=10240)
ALLOWED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
MODELS = {"2b": TRANSFORMER_2B, "13b": TRANSFORMER_13B}
WORDS = ("a", "red", "circle", "moving", "right", "on", "the", "river", "while", "light", "follows", "an", "old", "man")
POOL = (1 << 24) + 1  # numbers drawn once; odd, so that rows of a tensor that goes round are not alike


class Noise:
    """Numbers for tensors, by name: pieces of one pool, so that writing is limited by the disk."""

    def __init__(self) -> None:
        self.pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Numbers of the shape of `tensor` that keep activations near their size."""
        if name.endswith(("norm.weight", "layer_norm.weight", "std-of-means")):
            return torch.ones(tensor.shape)
        if name.endswith("timestep_scale_multiplier"):
            return torch.full(tensor.shape, 1000.0)
        if tensor.ndim < 2:
            return torch.zeros(tensor.shape)
        start = crc32(name.encode()) % POOL
        count = tensor.numel()
        around = self.pool.roll(-start).repeat(-(-count // POOL))[:count]
        return around.view(tensor.shape) * tensor[0].numel() ** -0.5


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


def write(folder: Path, model: str = "2b") -> Path:
    """Write the checkpoint and its text encoder; returns the checkpoint's path. What is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path, noise = folder / f"random-{model}-0.9.8-distilled.safetensors", Noise()
    if not path.exists():
        with torch.device("meta"):
            transformer, vae = Transformer(MODELS[model]), VAE(VAE_0_9_5)
        schedule = Schedule(sampler="LinearQuadratic", allowed=ALLOWED)
        write_single_file(path, transformer=transformer, vae=vae, schedule=schedule, filled=noise)
    if not (folder / "text_encoder" / "config.json").exists():
        with torch.device("meta"):
            encoder = T5Encoder(T5_XXL)
        write_text_encoder(folder, encoder, tokenizer(folder / "made"), filled=noise)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="2b")
    asked = parser.parse_args()
    began = time.monotonic()
    path = write(asked.folder, asked.model)
    print(f"{path}  ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
