"""Make the demo model, from nothing: `python -m train`. Cut off, it goes on where it was."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from train import transformer, vae
from train.export import export

ASSETS = Path(__file__).parent.parent / "src" / "kadr" / "assets" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="states, logs and the tokenizer")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished model goes")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--stage", choices=("all", "vae", "transformer", "export"), default="all")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.stage in ("all", "vae"):
        vae.train(chosen.runs)
    if chosen.stage in ("all", "transformer"):
        transformer.train(chosen.runs, vae.trained(chosen.runs))
    if chosen.stage in ("all", "export"):
        export(chosen.runs, chosen.assets)


if __name__ == "__main__":
    main()
