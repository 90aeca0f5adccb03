"""Predicts the headers of released files from the registry, for plans of models that are not on disk.

The predicted header of a model goes through the same detection as a file's own, so both give the same configs. The
names and shapes of the tensors are those that `checkpoints.save` would write. Their offsets in the file are not
predicted: they are 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.single_file import detect_single_file
from kadr.checkpoints.detect.split import split_components
from kadr.checkpoints.detect.upscaler import MODEL_KIND
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES, VAE_FAMILIES
from kadr.checkpoints.gguf.header import ARCHITECTURE_KEY, T5_ENCODER_ARCHITECTURE
from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.keys import T5_GGUF_KEYS, T5_KEYS, TRANSFORMER_PREFIX, VAE_PREFIX, VAE_UNUSED_KEYS
from kadr.checkpoints.lora.file import LoraFile, lora_keys
from kadr.checkpoints.save import single_file_content, tensors_by_file_key, upscaler_content
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
_BLOCK_MATRIX = re.compile(rf"{re.escape(TRANSFORMER_PREFIX)}transformer_blocks\.\d+\.(attn|ff).*\.weight")
# Pattern of the layers of the 13B transformer that a released LoRA adapts, and its rank: the sizes of the files allow
# no others.
_ALL_LAYERS, _BLOCK_LAYERS, _ATTENTION_LAYERS = r".*", r"blocks\..*", r"blocks\.\d+\.(self|cross)_attention\..*"
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
    if release.kind == MODEL_KIND:
        tensors, metadata = _model_content(release)
    else:
        with torch.device("meta"):
            upscaler = LatentUpscaler(UPSCALER_CONFIGS[release.kind])
        tensors, metadata = upscaler_content(upscaler)
    path = Path(release.file)
    infos = (
        TensorInfo(name, shape, _storage_dtype(release, name), path, 0)
        for name, shape in ((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    )
    source = _predicted_source(release, infos, metadata)
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
    with torch.device("meta"):
        encoder = T5Encoder(T5_XXL)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_by_file_key(encoder, key_table).items()}
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
    layer_pattern, rank = RELEASED_LORAS[release.name]
    with torch.device("meta"):
        module = Transformer(TRANSFORMER_13B)
    linears = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, Linear) and re.fullmatch(layer_pattern, name)
    }
    path = Path(release.file)
    infos = []
    for name, (down_key, up_key) in lora_keys(linears).items():
        layer = linears[name]
        infos.append(TensorInfo(down_key, (rank, layer.in_features), torch.bfloat16, path, 0))
        infos.append(TensorInfo(up_key, (layer.out_features, rank), torch.bfloat16, path, 0))
    return LoraFile.from_source(path, _predicted_source(release, infos, {}))


def predict_schedule(release: Release) -> Schedule:
    """Returns the schedule in the header of a released model."""
    schedule = FAMILY_SCHEDULES[_vae_family(release)]
    if release.version.startswith("0.9.8-distilled"):
        return replace(schedule, allowed_sigmas=DISTILLED_SIGMAS)
    return schedule


def _model_content(release: Release) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a released model on meta by key, and its metadata."""
    family = _vae_family(release)
    assert release.num_layers is not None
    config = replace(TRANSFORMER_CONFIGS[release.num_layers], causal_temporal_positioning=family == "0.9.5")
    with torch.device("meta"):
        transformer, vae = Transformer(config), VAE(VAE_FAMILIES[family])
    tensors, metadata = single_file_content(transformer, vae, predict_schedule(release))
    return tensors | {VAE_PREFIX + key: vae.statistics.mean for key in VAE_UNUSED_KEYS}, metadata


def _vae_family(release: Release) -> str:
    assert release.vae_family is not None
    return release.vae_family


def _storage_dtype(release: Release, name: str) -> torch.dtype:
    if release.kind != MODEL_KIND or release.version == "0.9":
        return torch.float32
    is_fp8 = release.name.endswith("-fp8") and _BLOCK_MATRIX.fullmatch(name) is not None
    return torch.float8_e4m3fn if is_fp8 else torch.bfloat16


def _ggml_info(name: str, shape: tuple[int, ...], type_name: str, path: Path) -> TensorInfo:
    """Describes a tensor that is stored in float32 or in blocks."""
    ggml_type = GGML_TYPES.get(type_name)
    return TensorInfo(name, shape, torch.float32 if ggml_type is None else torch.uint8, path, 0, ggml_type)


def _predicted_source(release: Release, infos: Iterable[TensorInfo], metadata: Mapping[str, Any]) -> Source:
    return Source(Path(release.file), {info.name: info for info in infos}, metadata, absent_release=release.name)


def _check_kind(release: Release, *kinds: str) -> None:
    if release.kind not in kinds or release.repo is None:
        raise ValueError(f"{release.name} is not a {' or '.join(kinds)} that is fetched; open its file")
