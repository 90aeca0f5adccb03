"""Make the demo model, from nothing: `python -m train`. Cut off, it goes on where it was."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from train import distill, transformer, tuning, upscaler, vae
from train.export import export

ASSETS = Path(__file__).parent.parent / "src" / "kadr" / "assets" / "demo"


TRAINING_STEPS: dict[str, Callable[[Path], object]] = {
    "vae": vae.train,
    "transformer": lambda runs: transformer.train(runs, vae.load_trained_vae(runs)),
    "tuning": lambda runs: tuning.tune(runs, vae.load_trained_vae(runs)),
    "distill": lambda runs: distill.distill(runs, vae.load_trained_vae(runs)),
    "upsampler": lambda runs: upscaler.train(runs, vae.load_trained_vae(runs)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="states, logs and the tokenizer")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished model goes")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--stage", choices=("all", *TRAINING_STEPS, "export"), default="all")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for name, train in TRAINING_STEPS.items():
        if chosen.stage in ("all", name):
            train(chosen.runs)
    if chosen.stage in ("all", "export"):
        export(chosen.runs, chosen.assets)


if __name__ == "__main__":
    main()
