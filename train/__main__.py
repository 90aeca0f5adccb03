"""Trains the demo model from scratch: `python -m train`. Resumes an interrupted training."""

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
    "transformer": lambda folder: transformer.train(folder, vae.load_trained_vae(folder)),
    "tuning": lambda folder: tuning.tune(folder, vae.load_trained_vae(folder)),
    "distill": lambda folder: distill.distill(folder, vae.load_trained_vae(folder)),
    "upscaler": lambda folder: upscaler.train(folder, vae.load_trained_vae(folder)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument(
        "--state-folder", type=Path, default=Path("runs/demo"), help="folder of training states, logs and the tokenizer"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that the finished model is written to")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--stage", choices=("all", *TRAINING_STEPS, "export"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, train in TRAINING_STEPS.items():
        if options.stage in ("all", name):
            train(options.state_folder)
    if options.stage in ("all", "export"):
        export(options.state_folder, options.assets)


if __name__ == "__main__":
    main()
