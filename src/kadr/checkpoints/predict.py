"""Predicts the headers of released files from the registry, for plans of models that are not on disk.

The predicted header of a model goes through the same detection as a file's own, so both give the same configs. The
names and shapes of the tensors are those that `checkpoints.save` would write. Their offsets in the file are not
predicted: they are 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.single_file import detect_single_file
from kadr.checkpoints.detect.split import split_components
from kadr.checkpoints.detect.upscaler import MODEL_KIND
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES, VAE_FAMILIES
from kadr.checkpoints.gguf.header import ARCHITECTURE_KEY, T5_ENCODER_ARCHITECTURE
from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.keys import (
    T5_GGUF_KEYS,
    T5_KEYS,
    TRANSFORMER_KEYS,
    TRANSFORMER_PREFIX,
    UPSCALER_KEYS,
    VAE_KEYS,
    VAE_PREFIX,
    VAE_UNUSED_KEYS,
    Key,
)
from kadr.checkpoints.lora.file import LoraFile, lora_keys
from kadr.checkpoints.save import single_file_config, tensors_by_file_key
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.models.registry import DISTILLED_SIGMAS, LORA, Release
from kadr.models.t5 import T5_XXL, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG, LatentUpscaler
from kadr.models.vae import VAE
from kadr.nn.linear import Linear
from kadr.quant.mixes import assign_types, find_mix
from kadr.sampling.schedules import Schedule

TRANSFORMER_CONFIGS: Mapping[int, TransformerConfig] = {  # by number of layers
    config.num_layers: config for config in (TRANSFORMER_2B, TRANSFORMER_13B)
}
UPSCALER_CONFIGS = {config.kind: config for config in (SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG)}
TEXT_ENCODER_KIND = "text encoder"
Shapes = dict[str, tuple[int, ...]]  # of tensors by key
_BLOCKS = "transformer_blocks."  # prefix of the blocks' keys, before the index
# Part of the names of the layers that a released LoRA adapts in the 13B transformer, and its rank: both make the size
# of its file.
_ALL_LAYERS, _BLOCK_LAYERS, _ATTENTION_LAYERS = "", "blocks.", "_attention."
RELEASED_LORAS: Mapping[str, tuple[str, int]] = {
    "ltxv-13b-0.9.7-distilled-lora": (_ALL_LAYERS, 128),
    "ltxv-13b-0.9.7-ic-lora-canny": (_BLOCK_LAYERS, 8),
    "ltxv-13b-0.9.7-ic-lora-depth": (_BLOCK_LAYERS, 8),
    "ltxv-13b-0.9.7-ic-lora-pose": (_ATTENTION_LAYERS, 24),
    "ltxv-13b-0.9.8-ic-lora-detailer": (_BLOCK_LAYERS, 128),
}


@cache
def predict_checkpoint(release: Release) -> Checkpoint:
    """Predicts the header of a released model or upscaler.

    Raises:
        ValueError: the release is of another kind, or is bundled with kadr and therefore on disk.
    """
    _check_kind(release, MODEL_KIND, *UPSCALER_CONFIGS)
    path = Path(release.file)
    shapes, config = _predict_model(release) if release.kind == MODEL_KIND else _predict_upscaler(release)
    infos = (TensorInfo(name, shape, _storage_dtype(release, name, shape), path, 0) for name, shape in shapes.items())
    source = _predicted_source(release, infos, {"config": json.dumps(config)})
    components = split_components(source)
    return Checkpoint(path, detect_single_file(source, components, release=release), components)


@cache
def predict_text_encoder(release: Release) -> TextEncoderCheckpoint:
    """Predicts the header of a released text encoder: float32 shards, or a GGUF file named by its type.

    Raises:
        ValueError: the release is of another kind.
    """
    _check_kind(release, TEXT_ENCODER_KIND)
    path = Path(release.file)
    is_gguf = path.suffix == ".gguf"
    key_table = T5_GGUF_KEYS if is_gguf else T5_KEYS
    shapes = _shapes(lambda: T5Encoder(T5_XXL), key_table)
    types = dict.fromkeys(shapes, "F32")
    if is_gguf:
        mix = find_mix(path.stem.rpartition("-")[2])
        types = assign_types(mix, mix.text_encoder, {name: (shape, "F32") for name, shape in shapes.items()})
    infos = (_ggml_info(name, shape, types[name], path) for name, shape in shapes.items())
    metadata = {ARCHITECTURE_KEY: T5_ENCODER_ARCHITECTURE} if is_gguf else {}
    source = _predicted_source(release, infos, metadata)
    return TextEncoderCheckpoint(path, path, T5_XXL, source, key_table)


@cache
def predict_lora(release: Release) -> LoraFile:
    """Predicts the header of a released LoRA. All of them are for the 13B models.

    Raises:
        ValueError: the release is of another kind, or is bundled with kadr and therefore on disk.
    """
    _check_kind(release, LORA)
    name_part, rank = RELEASED_LORAS[release.name]
    with torch.device("meta"):
        module = Transformer(replace(TRANSFORMER_13B, num_layers=1))
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear) and name_part in name}
    shapes: Shapes = {}
    for name, (down_key, up_key) in lora_keys(linears).items():
        shapes |= {down_key: (rank, linears[name].in_features), up_key: (linears[name].out_features, rank)}
    path = Path(release.file)
    infos = (
        TensorInfo(name, shape, torch.bfloat16, path, 0)
        for name, shape in _repeat_block(shapes, TRANSFORMER_13B.num_layers).items()
    )
    return LoraFile.from_source(path, _predicted_source(release, infos, {}))


def predict_schedule(release: Release) -> Schedule:
    """Returns the schedule in the header of a released model."""
    schedule = FAMILY_SCHEDULES[_vae_family(release)]
    if release.version.startswith("0.9.8-distilled"):
        return replace(schedule, allowed_sigmas=DISTILLED_SIGMAS)
    return schedule


def _predict_model(release: Release) -> tuple[Shapes, dict[str, Any]]:
    """Returns the shapes and the config in the header of a released model."""
    family = _vae_family(release)
    assert release.num_layers is not None
    config = replace(TRANSFORMER_CONFIGS[release.num_layers], causal_temporal_positioning=family == "0.9.5")
    vae_config = VAE_FAMILIES[family]
    one_block = _shapes(lambda: Transformer(replace(config, num_layers=1)), TRANSFORMER_KEYS, TRANSFORMER_PREFIX)
    shapes = _repeat_block(one_block, config.num_layers) | _shapes(lambda: VAE(vae_config), VAE_KEYS, VAE_PREFIX)
    shapes |= {VAE_PREFIX + key: (vae_config.latent_channels,) for key in VAE_UNUSED_KEYS}
    return shapes, single_file_config(config, vae_config, predict_schedule(release))


def _predict_upscaler(release: Release) -> tuple[Shapes, dict[str, Any]]:
    """Returns the shapes and the config in the header of a released upscaler."""
    config = UPSCALER_CONFIGS[release.kind]
    return _shapes(lambda: LatentUpscaler(config), UPSCALER_KEYS), config.to_header()


def _shapes(build: Callable[[], nn.Module], table: tuple[Key, ...], prefix: str = "") -> Shapes:
    with torch.device("meta"):
        module = build()
    return {key: tuple(tensor.shape) for key, tensor in tensors_by_file_key(module, table, prefix).items()}


def _repeat_block(shapes: Shapes, num_layers: int) -> Shapes:
    """Returns the shapes of a transformer from those of one with a single block, which is quicker to build."""
    repeated: Shapes = {}
    for name, shape in shapes.items():
        before, blocks, after = name.partition(f"{_BLOCKS}0.")
        names = [f"{before}{_BLOCKS}{block}.{after}" for block in range(num_layers)] if blocks else [name]
        repeated |= dict.fromkeys(names, shape)
    return repeated


def _vae_family(release: Release) -> str:
    assert release.vae_family is not None
    return release.vae_family


def _storage_dtype(release: Release, name: str, shape: tuple[int, ...]) -> torch.dtype:
    if release.kind != MODEL_KIND or release.version == "0.9":
        return torch.float32
    is_block_matrix = len(shape) == 2 and name.startswith(TRANSFORMER_PREFIX + _BLOCKS) and name.endswith(".weight")
    return torch.float8_e4m3fn if is_block_matrix and release.name.endswith("-fp8") else torch.bfloat16


def _ggml_info(name: str, shape: tuple[int, ...], type_name: str, path: Path) -> TensorInfo:
    """Describes a tensor that is stored in float32 or in blocks."""
    ggml_type = GGML_TYPES.get(type_name)
    return TensorInfo(name, shape, torch.float32 if ggml_type is None else torch.uint8, path, 0, ggml_type)


def _predicted_source(release: Release, infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> Source:
    return Source(Path(release.file), {info.name: info for info in infos}, metadata, absent_release=release.name)


def _check_kind(release: Release, *kinds: str) -> None:
    if release.kind not in kinds or release.repo is None:
        raise ValueError(f"{release.name} is not a {' or '.join(kinds)} that is fetched; open its file")
