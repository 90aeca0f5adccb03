"""Exports trained weights as the demo model: an official single file, and a T5 folder beside it."""

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
CURVES = ("vae", "transformer", "tuned", "distilled", "upscaler")


def _trim_vocabulary(text_encoder: T5Encoder, vocab_size: int) -> T5Encoder:
    """Returns the encoder without the rows of its embedding that no token uses."""
    state = text_encoder.state_dict()
    state["embedding.weight"] = state["embedding.weight"][:vocab_size]
    trimmed = T5Encoder(replace(text_encoder.config, vocab_size=vocab_size))
    trimmed.load_state_dict(state)
    return trimmed


def export(state_folder: Path, assets: Path) -> None:
    """Writes the checkpoints, text_encoder and tokenizer into `assets` from the EMA weights in `state_folder`."""
    assets.mkdir(parents=True, exist_ok=True)
    modules = build_modules()
    modules.load_state_dict(_load_ema(state_folder, "tuned"))
    vae, distilled, upscaler = VAE(DEMO_VAE), Transformer(DEMO_TRANSFORMER), LatentUpscaler(DEMO_UPSCALER)
    for module, name in ((vae, "vae"), (distilled, "distilled"), (upscaler, "upscaler")):
        module.load_state_dict(_load_ema(state_folder, name))
    schedule = Schedule(sampler="LinearQuadratic")
    distilled_schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=SIGMAS)
    options = {"dtype": torch.bfloat16}
    write_single_file(
        assets / "demo.safetensors", transformer=modules["transformer"], vae=vae, schedule=schedule, **options
    )
    write_single_file(
        assets / "demo-distilled.safetensors", transformer=distilled, schedule=distilled_schedule, **options
    )
    write_upscaler(assets / "demo-upscaler.safetensors", upscaler, **options)
    sentencepiece_file = state_folder / "tokenizer" / "spiece.model"
    text_encoder = _trim_vocabulary(modules["text_encoder"], Tokenizer.open(sentencepiece_file).vocab_size)
    write_text_encoder(assets, text_encoder, sentencepiece_file, **options)
    for curve in CURVES:
        shutil.copy(state_folder / f"{curve}.csv", Path(__file__).parent / "curves" / f"{curve}.csv")
    sizes = {path.name: path.stat().st_size for path in assets.glob("*.safetensors")}
    print(json.dumps({"bytes": sizes, "limits": MAX_BYTES}))
    if too_large := [
        f"{name} has {size} bytes of {MAX_BYTES[name]}" for name, size in sizes.items() if size > MAX_BYTES[name]
    ]:
        raise SystemExit(f"too large to ship: {', '.join(too_large)}")


def _load_ema(state_folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(state_folder / f"{name}.pt", weights_only=True)["ema"]
