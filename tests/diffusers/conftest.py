"""A tiny model as a diffusers folder, and diffusers' own pipelines of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.convert.convert import convert_checkpoint
from kadr.sampling.schedules import Schedule
from tests.tiny_models import LINEAR_QUADRATIC, MODEL_FILE, SHIFTED, write_model, write_random_upscaler

PROMPT, NEGATIVE_PROMPT = "a red circle moving right over the sea", "birds fly slowly"
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "num_inference_steps": 3,
        "frame_rate": 24,
    }
)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_image(seed: int, width: int = 80, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise_clip(frames: int, seed: int = 30) -> list[Image.Image]:
    return [noise_image(seed + number) for number in range(frames)]


def _released_scale(module: nn.Module) -> None:
    """Gives the decoder the released scale of timesteps, which diffusers' transformer has as a constant."""
    for name, tensor in module.state_dict().items():
        if name.endswith("timestep_scale_multiplier"):
            tensor.fill_(1000.0)


def write_folder(root: Path, *, family: str, schedule: Schedule) -> Path:
    """Writes a tiny model as a folder that diffusers and kadr read, and returns it."""
    home = write_model(
        root / "single",
        family=family,
        is_causal=family == "0.9.5",
        schedule=schedule,
        weight_edits={"vae": _released_scale},
    )
    folder = root / "folder"
    convert_checkpoint(Checkpoint.open(home / MODEL_FILE), folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, kind in (("text_encoder", "T5EncoderModel"), ("tokenizer", "T5TokenizerFast")):
        (home / name).rename(folder / name)
        index[name] = ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 0.9.5: causal, linear-quadratic, with a decoder that takes noise."""
    return write_folder(tmp_path_factory.mktemp("0.9.5"), family="0.9.5", schedule=LINEAR_QUADRATIC)


@pytest.fixture(scope="session")
def shifted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 0.9: positions are not causal, and sigmas are shifted."""
    return write_folder(tmp_path_factory.mktemp("0.9"), family="0.9", schedule=SHIFTED)


Oracle = Callable[..., Any]  # name, folder, dtype -> pipeline


@pytest.fixture(scope="session")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny spatial upscaler as a folder that diffusers and kadr read."""
    root = tmp_path_factory.mktemp("upscaler")
    convert_checkpoint(Checkpoint.open(write_random_upscaler(root / "upscaler.safetensors")), root / "folder")
    index = {
        "_class_name": "LTXLatentUpsamplePipeline",
        "latent_upsampler": ["ltx", "LTXLatentUpsamplerModel"],
        "vae": ["diffusers", "AutoencoderKLLTXVideo"],
    }
    (root / "folder" / "model_index.json").write_text(json.dumps(index))
    return root / "folder"


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """Returns diffusers' own pipeline of a name and a folder."""

    def build(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        pipeline = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture(scope="session")
def door() -> Oracle:
    """Returns kadr's pipeline of a name and a folder."""
    import kadr.diffusers

    def build(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        pipeline = getattr(kadr.diffusers, name).from_pretrained(folder, torch_dtype=dtype, prompt_cache=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build
