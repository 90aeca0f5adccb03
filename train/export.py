"""From trained weights to the demo model: the official single file, and a T5 folder beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from kadr.checkpoints.save import write_single_file, write_text_encoder, write_upscaler
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.sampling.schedules import Schedule
from kadr.text.tokenizer import Tokenizer
from train.distill import SIGMAS
from train.transformer import DEMO_TRANSFORMER, build_modules
from train.upscaler import DEMO_UPSCALER
from train.vae import DEMO_VAE

MAX_BYTES = {
    "demo.safetensors": 25_000_000,
    "demo-distilled.safetensors": 11_000_000,
    "demo-upscaler.safetensors": 5_000_000,
}
CURVES = ("vae", "transformer", "tuned", "distilled", "upsampler")


def _trim_vocabulary(text: T5Encoder, vocabulary: int) -> T5Encoder:
    """The encoder without the rows of its embedding that no token uses."""
    state = text.state_dict()
    state["embedding.weight"] = state["embedding.weight"][:vocabulary]
    smaller = T5Encoder(replace(text.config, vocab_size=vocabulary))
    smaller.load_state_dict(state)
    return smaller


def export(state_folder: Path, assets: Path) -> None:
    """Write the checkpoints, text_encoder and tokenizer into `assets` from the averaged weights in `state_folder`."""
    assets.mkdir(parents=True, exist_ok=True)
    both = build_modules()
    both.load_state_dict(_load_ema(state_folder, "tuned"))
    vae, distilled, upsampler = VAE(DEMO_VAE), Transformer(DEMO_TRANSFORMER), LatentUpscaler(DEMO_UPSCALER)
    for module, name in ((vae, "vae"), (distilled, "distilled"), (upsampler, "upsampler")):
        module.load_state_dict(_load_ema(state_folder, name))
    schedule, few = Schedule(sampler="LinearQuadratic"), Schedule(sampler="LinearQuadratic", allowed_sigmas=SIGMAS)
    stored = {"dtype": torch.bfloat16}
    write_single_file(
        assets / "demo.safetensors", transformer=both["transformer"], vae=vae, schedule=schedule, **stored
    )
    write_single_file(assets / "demo-distilled.safetensors", transformer=distilled, schedule=few, **stored)
    write_upscaler(assets / "demo-upscaler.safetensors", upsampler, **stored)
    text = _trim_vocabulary(both["text"], Tokenizer.open(state_folder / "tokenizer" / "spiece.model").vocab_size)
    write_text_encoder(assets, text, state_folder / "tokenizer" / "spiece.model", **stored)
    for curve in CURVES:
        shutil.copy(state_folder / f"{curve}.csv", Path(__file__).parent / "curves" / f"{curve}.csv")
    sizes = {path.name: path.stat().st_size for path in assets.glob("*.safetensors")}
    print(json.dumps({"bytes": sizes, "limits": MAX_BYTES}))
    if large := [name for name, size in sizes.items() if size > MAX_BYTES[name]]:
        raise SystemExit(f"{', '.join(large)} is larger than may be shipped")


def _load_ema(state_folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(state_folder / f"{name}.pt", weights_only=True)["average"]
