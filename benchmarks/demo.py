"""The demo model in kadr and in the official package, stage by stage: `python -m benchmarks.demo`.

Both run the same weights on the same input in one process, in turns, and their results are compared: a ratio of times
means nothing without it. Prints one JSON object; a ratio above 1 says how many times faster kadr is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from torch import Tensor

import kadr
from kadr.checkpoints.open import Checkpoint
from kadr.sampling.positions import positions
from kadr.shapes import LatentGrid

FILE = Path(kadr.__file__).parent / "assets" / "demo" / "demo.safetensors"


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of both, run in turns after one warm-up each, their ratio and their relative difference."""
    mine, reference = ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, spent in zip((ours, theirs), seconds, strict=True):
            began = time.perf_counter()
            run()
            spent.append(time.perf_counter() - began)
    kadr_seconds, official_seconds = (statistics.median(spent) for spent in seconds)
    return {
        "kadr_seconds": kadr_seconds,
        "official_seconds": official_seconds,
        "ratio": official_seconds / kadr_seconds,
        "relative_difference": float((mine - reference).norm() / reference.norm()),
    }


def transformer(frames: int, side: int, rounds: int) -> dict[str, float]:
    """One velocity of the demo transformer for a video of `frames` x `side` x `side`."""
    official = Transformer3DModel.from_pretrained(FILE).float().eval()
    ours = Checkpoint.open(FILE).load_transformer(torch.float32)
    grid = LatentGrid((frames - 1) // 8 + 1, side // 32, side // 32)
    where = positions(grid, fps=24, causal=True)[None]
    tokens, text = torch.randn(1, grid.tokens, 128), torch.randn(1, 256, ours.config.text_width)
    mask, level, rope = torch.arange(256)[None] < 20, torch.full((1, 1), 0.7), ours.rope(where)

    def theirs() -> Tensor:
        return official(
            tokens,
            indices_grid=where,
            encoder_hidden_states=text,
            encoder_attention_mask=mask.long(),
            timestep=level,
            return_dict=False,
        )[0]

    return compare(lambda: ours(tokens, rope, text, mask, level), theirs, rounds)


def decoder(frames: int, side: int, rounds: int) -> dict[str, float]:
    """The demo VAE's decoder, streamed, against the official whole decode."""
    official = CausalVideoAutoencoder.from_pretrained(FILE).float().eval()
    ours = Checkpoint.open(FILE).load_vae(torch.float32, encoder=False)
    latents = torch.randn(1, 128, (frames - 1) // 8 + 1, side // 32, side // 32)
    restored, level = ours.statistics.restore(latents), torch.tensor([0.05])
    shape = (1, 3, frames, side, side)
    return compare(
        lambda: torch.cat(list(ours.decode_stream(latents, level=level)), dim=2),
        lambda: official.decode(restored, target_shape=shape, timestep=level).sample,
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        sizes = (chosen.frames, chosen.side, chosen.rounds)
        report = {"threads": torch.get_num_threads(), "transformer": transformer(*sizes), "decoder": decoder(*sizes)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
