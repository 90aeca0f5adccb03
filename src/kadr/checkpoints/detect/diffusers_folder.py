"""A diffusers folder: its config files, read into ours.

A config of diffusers says the same as the official header in other words: lists per resolution instead of a list of
blocks. Widths and layer counts are free; the build must be that of one of the three families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kadr.checkpoints.detect.single_file import CheckpointInfo, confirm_release
from kadr.checkpoints.detect.upscaler import checkpoint_kind
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES, find_vae_family, version_label
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import Release
from kadr.models.transformer import TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.sampling.schedules import Schedule

COMPONENT_BY_CLASS: Mapping[str, str] = {
    "LTXVideoTransformer3DModel": "transformer",
    "AutoencoderKLLTXVideo": "vae",
    "LTXLatentUpsamplerModel": "upsampler",
}
COMPONENT_FOLDERS: Mapping[str, str] = {"transformer": "transformer", "vae": "vae", "upsampler": "latent_upsampler"}
_LTX2 = ("LTX2", "AVTransformer")  # how the class names of the next family begin

# Keys that change what is computed, with the only value released weights use; it is also what an absent key means.
_TRANSFORMER_REQUIRED: Mapping[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_out_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm_across_heads",
}
_VAE_REQUIRED: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "encoder_causal": True,
    "decoder_causal": False,
}
_SHIFT_REQUIRED: Mapping[str, Any] = {
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift": 1.0,
    "num_train_timesteps": 1000,
}
_DOWNSAMPLE_KINDS = {
    "spatial": "compress_space_res",
    "temporal": "compress_time_res",
    "spatiotemporal": "compress_all_res",
}


def open_diffusers_folder(path: Path, *, release: Release | None = None) -> tuple[CheckpointInfo, dict[str, Source]]:
    """Read the headers of a diffusers folder, or of one component's folder.

    Args:
        path: holds transformer/ or vae/ or both, or latent_upsampler/; or is one of them.
        release: the model that the user says it is.

    Returns:
        What it is, and its components' tensors under diffusers' names.

    Raises:
        CheckpointError: it is no such folder, or describes a build that is not of the family.
    """
    folders = _find_component_folders(path)
    configs = {component: read_json(folder / "config.json") for component, folder in folders.items()}
    sources = {component: Source.open(folder) for component, folder in folders.items()}
    vae = read_vae_config(configs["vae"], folders["vae"]) if "vae" in folders else None
    family = find_vae_family(vae) if vae else None
    transformer, era = None, family or (release.vae_family if release else None)
    if "transformer" in folders:
        config = configs["transformer"]
        era = era or _infer_transformer_family(path, config)
        transformer = read_transformer_config(config, folders["transformer"], causal_positions=era == "0.9.5")
    upsampler = read_upscaler_config(configs["upsampler"], folders["upsampler"]) if "upsampler" in folders else None
    release = confirm_release(
        path, release, transformer, family, kind=checkpoint_kind(transformer, upsampler), is_explicit=True
    )
    schedule = read_schedule(path / "scheduler" / "scheduler_config.json", era or "0.9.5")
    detected = CheckpointInfo(
        version=release.version if release else version_label(transformer, family, upsampler),
        release=release,
        layout="diffusers",
        transformer=transformer,
        vae=vae,
        vae_family=family,
        schedule=schedule,
        dtype=sources.get("transformer", next(iter(sources.values()))).dtype,
        upscaler=upsampler,
    )
    return detected, sources


def _infer_transformer_family(path: Path, config: Mapping[str, Any]) -> str:
    """Whose positions and noise levels it follows: those of a VAE's family."""
    if config.get("num_layers") == TRANSFORMER_13B.num_layers:
        return "0.9.5"
    raise CheckpointError(
        f"{path} has a transformer and no VAE, so it does not say whether it is of 0.9.5 or of one before. "
        "Put the vae folder of the same model beside it, or name the version (release=...)."
    )


def read_transformer_config(config: Mapping[str, Any], folder: Path, *, causal_positions: bool) -> TransformerConfig:
    """Read transformer/config.json. causal: of the positions, which the file does not say."""
    _check_required_values(config, _TRANSFORMER_REQUIRED, folder)
    read = TransformerConfig(
        num_layers=_get_positive_int(config, "num_layers", folder),
        num_heads=_get_positive_int(config, "num_attention_heads", folder),
        head_dim=_get_positive_int(config, "attention_head_dim", folder),
        caption_channels=_get_positive_int(config, "caption_channels", folder),
        in_channels=config.get("in_channels", 128),
        causal_temporal_positioning=causal_positions,
    )
    same = {"cross_attention_dim": read.width, "out_channels": read.in_channels}
    _check_required_values({key: config.get(key) or value for key, value in same.items()}, same, folder)
    return read


def read_vae_config(config: Mapping[str, Any], folder: Path) -> VAEConfig:
    """Read vae/config.json.

    Raises:
        CheckpointError: its build is none of the three families'.
    """
    _check_required_values(config, _VAE_REQUIRED, folder)
    try:
        conditioned = bool(config.get("timestep_conditioning", False))
        encoder, encoder_width = _encoder_blocks(config)
        decoder, decoder_width = _decoder_blocks(config)
        read = VAEConfig(
            encoder_blocks=encoder,
            decoder_blocks=decoder,
            timestep_conditioning=conditioned,
            latent_channels=config.get("latent_channels", 128),
            patch_size=config.get("patch_size", 4),
            encoder_base_channels=encoder_width,
            decoder_base_channels=decoder_width,
        )
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} describes no VAE of this family: {error!r}. Take the folder as it was released."
        ) from error
    if find_vae_family(read) is None:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a VAE that is built as none of 0.9, 0.9.1 and 0.9.5; diffusers' names "
            "are known for those only. Take the official single file of this model."
        )
    return read


def read_upscaler_config(config: Mapping[str, Any], folder: Path) -> UpscalerConfig:
    """Read latent_upsampler/config.json, which says what the official header says."""
    try:
        return UpscalerConfig.from_header({key: value for key, value in config.items() if not key.startswith("_")})
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def read_schedule(file: Path, vae_family: str) -> Schedule:
    """Read scheduler_config.json; where there is none, the schedule is that of the VAE's family.

    Without dynamic shifting the official recipe is linear-quadratic, which diffusers makes outside of its scheduler.
    """
    if not file.is_file():
        return FAMILY_SCHEDULES[vae_family]
    config = read_json(file)
    if not config.get("use_dynamic_shifting", False):
        return FAMILY_SCHEDULES["0.9.5"]
    _check_required_values(config, _SHIFT_REQUIRED, file)
    if config.get("time_shift_type", "exponential") != "exponential":
        raise CheckpointError(f"{file} shifts by {config['time_shift_type']!r}; kadr knows only 'exponential'.")
    return replace(FAMILY_SCHEDULES["0.9"], shift_terminal=config.get("shift_terminal"))


def _encoder_blocks(config: Mapping[str, Any]) -> tuple[tuple[BlockConfig, ...], int]:
    """The blocks of the encoder and the width that it starts with."""
    widths = config.get("block_out_channels", (128, 256, 512, 512))
    layers = config.get("layers_per_block", (4, 3, 3, 3, 4))
    scaling = config.get("spatio_temporal_scaling", (True, True, True, False))
    new = str(config.get("down_block_types", ("LTXVideoDownBlock3D",))[-1]) == "LTXVideo095DownBlock3D"
    kinds = config.get("downsample_type", ("conv",) * len(scaling))
    after = widths[1:] if new else (*widths[1:], widths[-1])
    blocks = []
    for width, wider, depth, scales, kind in zip(widths, after, layers, scaling, kinds, strict=False):
        blocks.append(BlockConfig(kind="res_x", num_layers=depth))
        if scales and new:
            blocks.append(BlockConfig(kind=_DOWNSAMPLE_KINDS[kind], multiplier=_channel_multiplier(wider, width)))
        elif scales:
            blocks.append(BlockConfig(kind="compress_all"))
        if not new and wider != width:
            blocks.append(BlockConfig(kind="res_x_y", multiplier=_channel_multiplier(wider, width)))
    return (*blocks, BlockConfig(kind="res_x", num_layers=layers[-1])), widths[0]


def _decoder_blocks(config: Mapping[str, Any]) -> tuple[tuple[BlockConfig, ...], int]:
    """The blocks of the decoder, in the order of the encoder, and the width that it ends with."""
    widths = config.get("decoder_block_out_channels", (128, 256, 512, 512))
    layers = config.get("decoder_layers_per_block", (4, 3, 3, 3, 4))
    scaling = config.get("decoder_spatio_temporal_scaling", (True, True, True, False))
    noisy = config.get("decoder_inject_noise", (False,) * len(layers))
    residual = config.get("upsample_residual", (False,) * len(widths))
    factors = config.get("upsample_factor", (1,) * len(widths))
    made = [width // factor for width, factor in zip(widths, factors, strict=True)]
    given = [*made[1:], widths[-1]]  # by the block before, which comes after in this order
    blocks = []
    for i, width in enumerate(made):
        blocks.append(BlockConfig(kind="res_x", num_layers=layers[i], inject_noise=noisy[i]))
        if scaling[i]:
            blocks.append(BlockConfig(kind="compress_all", multiplier=factors[i], residual=residual[i]))
        if given[i] // factors[i] != width:
            multiplier = _channel_multiplier(given[i] // factors[i], width)
            blocks.append(BlockConfig(kind="res_x_y", multiplier=multiplier, inject_noise=noisy[i]))
    return (*blocks, BlockConfig(kind="res_x", num_layers=layers[-1], inject_noise=noisy[-1])), made[0]


def _channel_multiplier(wider: int, width: int) -> int:
    times, rest = divmod(wider, width)
    if rest or not times:
        raise ValueError(f"{wider} channels are no multiple of {width}")
    return times


def _find_component_folders(path: Path) -> dict[str, Path]:
    """Component -> its folder."""
    found = {component: path / name for component, name in COMPONENT_FOLDERS.items() if (path / name).is_dir()}
    if not found and (path / "config.json").is_file():
        kind = str(read_json(path / "config.json").get("_class_name"))
        if kind in COMPONENT_BY_CLASS:
            return {COMPONENT_BY_CLASS[kind]: path}
        if "T5" in str(read_json(path / "config.json").get("architectures")):
            raise CheckpointError(
                f"{path} is a T5 text encoder, not a model. Open the model, and give this folder as --text-encoder."
            )
    if not found:
        held = sorted(entry.name for entry in path.glob("*.safetensors"))
        way_out = f"Name one of the files in it: {', '.join(held[:5])}." if held else "Name a .safetensors instead."
        folders = ", ".join(f"{name}/" for name in COMPONENT_FOLDERS.values())
        raise CheckpointError(f"{path} is no diffusers folder: it has none of {folders} in it. {way_out}")
    for component, folder in found.items():
        kind = str(read_json(folder / "config.json").get("_class_name"))
        if kind.startswith(_LTX2) or kind.endswith("LTX2Video"):
            raise CheckpointError(f"{path} is LTX-2, another family of models ({kind}). kadr runs 0.9 to 0.9.8.")
        if COMPONENT_BY_CLASS.get(kind) != component:
            raise CheckpointError(
                f"{folder} holds a {kind}; kadr runs {', '.join(COMPONENT_BY_CLASS)}, which are LTX-Video 0.9 to 0.9.8."
            )
    return found


def read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing. Download the whole folder.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a config: it must be a JSON object. Download it again.")
    return config


def _check_required_values(config: Mapping[str, Any], required: Mapping[str, Any], folder: Path) -> None:
    for key, value in required.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{folder} has {key} = {config[key]!r} in its config; kadr knows only {value!r}.")


def _get_positive_int(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder} has {key} = {value!r} in its config; it must be a positive whole number.")
    return value
