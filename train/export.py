"""From trained weights to the demo model: the official single file, and a T5 folder beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.sampling.schedule import Schedule
from kadr.text.tokenizer import Tokenizer
from train.transformer import DEMO_T5, DEMO_TRANSFORMER
from train.vae import DEMO_VAE

LIMIT = 25_000_000  # bytes that may be shipped


def _trimmed(text: T5Encoder, vocabulary: int) -> T5Encoder:
    """The encoder without the rows of its embedding that no token uses."""
    state = text.state_dict()
    state["embedding.weight"] = state["embedding.weight"][:vocabulary]
    smaller = T5Encoder(replace(text.config, vocabulary=vocabulary))
    smaller.load_state_dict(state)
    return smaller


def export(runs: Path, assets: Path) -> None:
    """Write `assets`/demo.safetensors, text_encoder and tokenizer from the averaged weights in `runs`."""
    vae, text, transformer = VAE(DEMO_VAE), T5Encoder(DEMO_T5), Transformer(DEMO_TRANSFORMER)
    vae.load_state_dict(torch.load(runs / "vae.pt", weights_only=True)["average"])
    state = torch.load(runs / "transformer.pt", weights_only=True)
    both = torch.nn.ModuleDict({"text": text, "transformer": transformer})
    both.load_state_dict(state["average"])
    text = _trimmed(text, Tokenizer.open(runs / "tokenizer" / "spiece.model").size)
    assets.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(sampler="LinearQuadratic")
    write_single_file(
        assets / "demo.safetensors", transformer=transformer, vae=vae, schedule=schedule, dtype=torch.bfloat16
    )
    write_text_encoder(assets, text, runs / "tokenizer" / "spiece.model", dtype=torch.bfloat16)
    for curve in ("vae.csv", "transformer.csv"):
        shutil.copy(runs / curve, Path(__file__).parent / "curves" / curve)
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    print(json.dumps({"bytes": size, "limit": LIMIT, "steps": state["step"]}))
    if size > LIMIT:
        raise SystemExit(f"the demo model takes {size:,} bytes; at most {LIMIT:,} may be shipped")
