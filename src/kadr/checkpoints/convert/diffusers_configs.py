"""Writes the configs of a diffusers folder: the inverse of `detect.diffusers_folder`, and checked against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kadr.checkpoints.detect.diffusers_folder import (
    ALLOWED_SIGMAS_KEY,
    COMPONENT_BY_CLASS,
    DOWNSAMPLE_KINDS,
    SHIFT_REQUIRED,
    TRANSFORMER_REQUIRED,
    VAE_REQUIRED,
    parse_schedule,
    read_transformer_config,
    read_vae_config,
)
from kadr.checkpoints.detect.single_file import CheckpointInfo
from kadr.errors import CheckpointError
from kadr.models.transformer import TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.sampling.schedules import Schedule

CLASS_NAMES = {component: class_name for class_name, component in COMPONENT_BY_CLASS.items()}
_SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
# Of the older families diffusers computes them, and their released configs do not have them.
_COMPRESSION_0_9_5 = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
_DOWNSAMPLE_TYPES = {kind: name for name, kind in DOWNSAMPLE_KINDS.items()}


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """Returns transformer/config.json."""
    return {
        "_class_name": CLASS_NAMES["transformer"],
        **TRANSFORMER_REQUIRED,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
    }


def vae_json(config: VAEConfig, family: str) -> dict[str, Any]:
    """Returns vae/config.json."""
    return {
        "_class_name": CLASS_NAMES["vae"],
        **VAE_REQUIRED,
        "latent_channels": config.latent_channels,
        "patch_size": config.patch_size,
        "timestep_conditioning": config.timestep_conditioning,
        **(_COMPRESSION_0_9_5 if family == "0.9.5" else {}),
        **_encoder_json(config, is_0_9_5=family == "0.9.5"),
        **_decoder_json(config),
    }


def upscaler_json(config: UpscalerConfig) -> dict[str, Any]:
    """Returns latent_upsampler/config.json, which has the keys of the official header."""
    return {**config.to_header(), "_class_name": CLASS_NAMES["upscaler"]}


def scheduler_json(schedule: Schedule) -> dict[str, Any]:
    """Returns scheduler/scheduler_config.json."""
    return {
        "_class_name": _SCHEDULER_CLASS,
        **SHIFT_REQUIRED,
        "use_dynamic_shifting": schedule.shifting is not None,
        "shift_terminal": schedule.shift_terminal,
    }


def model_index_json(info: CheckpointInfo) -> dict[str, Any]:
    """Returns model_index.json of `LTXPipeline`; a component that is not in the folder is null.

    Keys that begin with _ are hidden from diffusers' classes: they say what its configs have no place for.
    """
    hidden: dict[str, Any] = {} if info.release is None else {"_name_or_path": info.release.name}
    if info.schedule.allowed_sigmas is not None:
        hidden[ALLOWED_SIGMAS_KEY] = list(info.schedule.allowed_sigmas)
    components = {"transformer": info.transformer, "vae": info.vae}
    return {
        "_class_name": "LTXPipeline",
        **hidden,
        "scheduler": ["diffusers", _SCHEDULER_CLASS],
        **{name: ["diffusers", CLASS_NAMES[name]] if config else [None, None] for name, config in components.items()},
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }


def check_expressible(info: CheckpointInfo, path: Path) -> None:
    """Checks that a diffusers folder can say everything of a model: that kadr would read the same model from it.

    Args:
        path: of the checkpoint, for the error.

    Raises:
        CheckpointError: it cannot; the message says what it has no place for.
    """
    family = info.vae_family
    if info.vae is not None and family is None:
        raise CheckpointError(
            f"{path} has a VAE that is built as none of 0.9, 0.9.1 and 0.9.5; diffusers has no keys for it. Keep it "
            "in a single file."
        )
    if info.transformer is not None and info.vae is None:
        if info.transformer.num_layers != TRANSFORMER_13B.num_layers:
            raise CheckpointError(
                f"{path} has a transformer and no VAE. Of a 2B model, diffusers' configs tell the version only by the "
                "VAE: convert the file that has both."
            )
        family = "0.9.5"
    differences = []
    if info.transformer is not None:
        is_causal = family == "0.9.5"
        read = read_transformer_config(transformer_json(info.transformer), path, causal_positions=is_causal)
        differences += _differences(read, info.transformer)
    if info.vae is not None:
        differences += _differences(read_vae_config(vae_json(info.vae, family or ""), path), info.vae)
    if info.upscaler is None:
        schedule = parse_schedule(scheduler_json(info.schedule), path)
        differences += _differences(replace(schedule, allowed_sigmas=info.schedule.allowed_sigmas), info.schedule)
    if differences:
        raise CheckpointError(
            f"{path} cannot become a diffusers folder, which has no place for {', '.join(differences)}. Keep it in a "
            "single file."
        )


def _differences(read: Any, config: Any) -> list[str]:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return [f"{name} = {value!r}" for name, value in values.items() if getattr(read, name) != value]


def _split_levels(blocks: tuple[BlockConfig, ...], width: int) -> list[tuple[int, list[BlockConfig]]]:
    """Splits a list of blocks, in the order of the encoder, where a "res_x" begins.

    Returns:
        (width at its start, its blocks) of every level; the last is the middle block alone.
    """
    levels: list[tuple[int, list[BlockConfig]]] = []
    for block in blocks:
        if block.kind == "res_x":
            levels.append((width, [block]))
        else:
            levels[-1][1].append(block)
        width *= block.multiplier
    return levels


def _find_resampling(blocks: list[BlockConfig]) -> BlockConfig | None:
    return next((block for block in blocks if block.kind.startswith("compress")), None)


def _encoder_json(config: VAEConfig, *, is_0_9_5: bool) -> dict[str, Any]:
    levels = _split_levels(config.encoder_blocks, config.encoder_base_channels)
    resampling = [_find_resampling(blocks) for _, blocks in levels[:-1]]
    widths = [width for width, _ in levels]
    block_type = "LTXVideo095DownBlock3D" if is_0_9_5 else "LTXVideoDownBlock3D"
    return {
        "block_out_channels": widths if is_0_9_5 else widths[:-1],
        "down_block_types": [block_type] * len(resampling),
        "downsample_type": [_DOWNSAMPLE_TYPES.get(block.kind, "conv") if block else "conv" for block in resampling],
        "layers_per_block": [blocks[0].num_layers for _, blocks in levels],
        "spatio_temporal_scaling": [block is not None for block in resampling],
    }


def _decoder_json(config: VAEConfig) -> dict[str, Any]:
    levels = _split_levels(config.decoder_blocks, config.decoder_base_channels)
    resampling = [_find_resampling(blocks) for _, blocks in levels[:-1]]
    factors = [block.multiplier if block else 1 for block in resampling]
    return {
        "decoder_block_out_channels": [width * factor for (width, _), factor in zip(levels[:-1], factors, strict=True)],
        "decoder_layers_per_block": [blocks[0].num_layers for _, blocks in levels],
        "decoder_spatio_temporal_scaling": [block is not None for block in resampling],
        "decoder_inject_noise": [blocks[0].inject_noise for _, blocks in levels],
        "upsample_residual": [block.residual if block else False for block in resampling],
        "upsample_factor": factors,
    }


def config_files(info: CheckpointInfo) -> Mapping[str, dict[str, Any]]:
    """Returns name -> content of the JSON files of a folder with the components of a checkpoint."""
    files: dict[str, dict[str, Any]] = {}
    if info.transformer is not None:
        files["transformer/config.json"] = transformer_json(info.transformer)
    if info.vae is not None:
        files["vae/config.json"] = vae_json(info.vae, info.vae_family or "")
    if info.upscaler is not None:
        return {**files, "latent_upsampler/config.json": upscaler_json(info.upscaler)}
    scheduler = {"scheduler/scheduler_config.json": scheduler_json(info.schedule)}
    return {**files, **scheduler, "model_index.json": model_index_json(info)}
