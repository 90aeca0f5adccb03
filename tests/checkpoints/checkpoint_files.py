"""Checkpoint files for tests, written here and not by the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kadr.checkpoints import keys
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE, VAEConfig
from kadr.models.vae.config import VAE_0_9_5
from kadr.sampling.schedules import Schedule

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8}
Shapes = dict[str, tuple[int, ...]]

SMALL_TRANSFORMER = TransformerConfig(num_layers=2, num_heads=2, head_dim=16, caption_channels=24, in_channels=12)
SMALL_VAE = replace(VAE_0_9_5, encoder_base_channels=16, decoder_base_channels=16, latent_channels=12)
SMALL_T5 = T5Config(vocab_size=160, d_model=32, num_layers=2, num_heads=2, d_kv=8, d_ff=48)
SMALL_UPSCALER = UpscalerConfig(
    in_channels=12, mid_channels=32, num_blocks_per_stage=2, spatial_upsample=True, temporal_upsample=False
)
LINEAR_QUADRATIC = Schedule(sampler="LinearQuadratic")


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@cache
def _shapes(config: Any, prefix: str) -> Shapes:
    build, table = (
        (Transformer, keys.TRANSFORMER_KEYS) if isinstance(config, TransformerConfig) else (VAE, keys.VAE_KEYS)
    )
    state = build_on_meta(lambda: build(config)).state_dict()
    return {prefix + file_key: tuple(state[key].shape) for key, file_key in keys.map_keys(table, state).items()}


def single_file_shapes(
    transformer: TransformerConfig | None = None, vae: VAEConfig | None = None, *, without_prefix: bool = False
) -> Shapes:
    """Returns the keys and shapes of an official single file, with or without the components' prefixes."""
    shapes: Shapes = {}
    for config, prefix in ((transformer, "model.diffusion_model."), (vae, "vae.")):
        if config is not None:
            shapes |= _shapes(config, "" if without_prefix else prefix)
    return shapes


def t5_shapes(config: T5Config) -> Shapes:
    state = build_on_meta(lambda: T5Encoder(config)).state_dict()
    return {file_key: tuple(state[key].shape) for key, file_key in keys.map_keys(keys.T5_KEYS, state).items()}


def upscaler_shapes(config: UpscalerConfig) -> Shapes:
    state = build_on_meta(lambda: LatentUpscaler(config)).state_dict()
    return {file_key: tuple(state[key].shape) for key, file_key in keys.map_keys(keys.UPSCALER_KEYS, state).items()}


def safetensors_header(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: str | Mapping[str, str] = "BF16", metadata: Any = None
) -> tuple[dict, int]:
    """Returns the header of a safetensors file and the number of bytes of its tensors.

    Args:
        dtype: of all tensors, or of each by name.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        tensor_dtype = dtype if isinstance(dtype, str) else dtype[name]
        start, end = end, end + prod(shape) * DTYPE_BYTES[tensor_dtype]
        entries[name] = {"dtype": tensor_dtype, "shape": list(shape), "data_offsets": [start, end]}
    return entries, end


def write_sparse(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str | Mapping[str, str] = "BF16",
    metadata: Any = None,
) -> Path:
    """Writes a sparse safetensors file of zeros, which takes no disk space."""
    entries, size = safetensors_header(shapes, dtype=dtype, metadata=metadata)
    return write_framed(path, json.dumps(entries).encode(), size)


def write_framed(path: Path, text: bytes, size: int) -> Path:
    """Writes header length, header, and `size` bytes of zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return path


def official_metadata(
    transformer: TransformerConfig | None = None,
    vae: VAEConfig | None = None,
    schedule: Schedule | None = LINEAR_QUADRATIC,
    **extra_entries: Any,
) -> dict[str, str]:
    """Returns the metadata of an official header, with further entries of the config."""
    components = {"transformer": transformer, "vae": vae, "scheduler": schedule}
    return {
        "config": json.dumps(
            {name: config.to_header() for name, config in components.items() if config is not None} | extra_entries
        )
    }


def have_same_weights(module: nn.Module, reference: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Returns whether two modules have the same weights under the same keys, the reference's rounded to `dtype`."""
    state, expected = module.state_dict(), reference.state_dict()

    def round_to_dtype(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    return list(state) == list(expected) and all(
        torch.equal(state[name], round_to_dtype(expected[name])) for name in state
    )
