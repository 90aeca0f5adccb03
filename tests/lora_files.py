"""Random LoRA files in every key format, for the tiny model or for layers of any width."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny_models

WIDTH = 64  # of the tiny transformer
ATTENTION = tuple(f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0"))
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
OUTER_LAYERS = {  # name -> in and out features, of 13B
    "patchify_proj": (128, 4096),
    "adaln_single.emb.timestep_embedder.linear_1": (256, 4096),
    "adaln_single.emb.timestep_embedder.linear_2": (4096, 4096),
    "adaln_single.linear": (4096, 6 * 4096),
    "caption_projection.linear_1": (4096, 4096),
    "caption_projection.linear_2": (4096, 4096),
    "proj_out": (4096, 128),
}
RANK = 4
Pairs = Mapping[str, tuple[Tensor, Tensor]]  # layer name in the single file -> down (r, in), up (out, r)


def block_pairs(
    targets: Iterable[str] = ATTENTION, *, num_layers: int = 2, rank: int = RANK, width: int = WIDTH, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns random pairs for layers of every block, by their names in the single file."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"ff.net.0.proj": (width, 4 * width), "ff.net.2": (4 * width, width)}
    pairs = {}
    for block in range(num_layers):
        for target in targets:
            in_features, out_features = sizes.get(target, (width, width))
            down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            up = torch.randn(out_features, rank, generator=generator) / rank
            pairs[f"transformer_blocks.{block}.{target}"] = down, up
    return pairs


def outer_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Returns random pairs for layers around the blocks, by their names in the single file."""
    generator = torch.Generator().manual_seed(9)
    sizes = {
        "patchify_proj": (tiny_models.CHANNELS, WIDTH),
        "proj_out": (WIDTH, tiny_models.CHANNELS),
        "adaln_single.linear": (WIDTH, 6 * WIDTH),
    }
    return {
        name: (torch.randn(2, in_features, generator=generator), torch.randn(out_features, 2, generator=generator) / 8)
        for name, (in_features, out_features) in sizes.items()
    }


def diffusers(name: str) -> tuple[str, str]:
    return f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight"


def comfy(name: str) -> tuple[str, str]:
    return f"diffusion_model.{name}.lora_A.weight", f"diffusion_model.{name}.lora_B.weight"


def peft(name: str) -> tuple[str, str]:
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def diffusers_with_adapter_name(name: str) -> tuple[str, str]:
    return f"transformer.{name}.lora_A.default.weight", f"transformer.{name}.lora_B.default.weight"


def kohya(name: str) -> tuple[str, str]:
    flat = f"lora_unet_{name.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"


def lycoris(name: str) -> tuple[str, str]:
    flat = f"lycoris_{name.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"


def comfy_down_up(name: str) -> tuple[str, str]:
    return f"diffusion_model.{name}.lora_down.weight", f"diffusion_model.{name}.lora_up.weight"


def plain(name: str) -> tuple[str, str]:
    return f"{name}.lora.down.weight", f"{name}.lora.up.weight"


KEY_FORMATS = {
    "diffusers": diffusers,
    "Comfy": comfy,
    "PEFT": peft,
    "kohya": kohya,
    "plain": plain,
}
NAMINGS: Mapping[str, Callable[[str], tuple[str, str]]] = {
    **KEY_FORMATS,
    "diffusers, with the adapter's name": diffusers_with_adapter_name,
    "lycoris": lycoris,
    "Comfy, down and up": comfy_down_up,
}


def write_lora_file(
    path: Path,
    pairs: Pairs,
    naming: Callable[[str], tuple[str, str]] = comfy,
    *,
    alpha: float | None = None,
    config: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a LoRA file.

    Args:
        naming: layer name -> keys of down and up.
        alpha: written as a tensor for every layer.
        config: PEFT's adapter config, written into the header like diffusers does.
    """
    tensors = {}
    for name, (down, up) in pairs.items():
        down_key, up_key = naming(name)
        tensors |= {down_key: down.contiguous(), up_key: up.contiguous()}
        if alpha is not None:
            tensors[f"{down_key.rpartition('.lora')[0]}.alpha"] = torch.tensor(alpha)
    header = dict(metadata or {})
    if config is not None:
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file({**tensors, **(extra_tensors or {})}, path, metadata={"format": "pt", **header})
    return path
