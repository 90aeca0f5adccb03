"""Reads the config files of a diffusers folder into kadr's configs.

A diffusers config states the same as the official header in another form: lists per resolution instead of a list of
blocks. Widths and layer counts are free; the VAE must be built as one of the three families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from kadr.checkpoints.detect.releases import ReleaseFacts, family_of_match, match_release, path_names
from kadr.checkpoints.detect.single_file import CheckpointInfo
from kadr.checkpoints.detect.upscaler import checkpoint_kind
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES, find_vae_family, version_label
from kadr.checkpoints.header import FP8_DTYPES
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.json_reader import parse_json
from kadr.models.registry import Release
from kadr.models.transformer import TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.quoting import quote
from kadr.regular_file import read_text
from kadr.sampling.schedules import Schedule

COMPONENT_BY_CLASS: Mapping[str, str] = {
    "LTXVideoTransformer3DModel": "transformer",
    "AutoencoderKLLTXVideo": "vae",
    "LTXLatentUpsamplerModel": "upscaler",
}
COMPONENT_FOLDERS: Mapping[str, str] = {"transformer": "transformer", "vae": "vae", "upscaler": "latent_upsampler"}
# In model_index.json: the sigmas that a model is restricted to, for which diffusers has no key. As in official headers.
ALLOWED_SIGMAS_KEY = "_allowed_inference_steps"
_LTX2_CLASS_PREFIXES = ("LTX2", "AVTransformer")

# Keys that change the computation, with the only value released weights use; an absent key means this value too.
TRANSFORMER_REQUIRED: Mapping[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_out_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm_across_heads",
}
VAE_REQUIRED: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "encoder_causal": True,
    "decoder_causal": False,
}
SHIFT_REQUIRED: Mapping[str, Any] = {
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift": 1.0,
    "num_train_timesteps": 1000,
}
DOWNSAMPLE_KINDS = {
    "spatial": "compress_space_res",
    "temporal": "compress_time_res",
    "spatiotemporal": "compress_all_res",
}


def open_diffusers_folder(path: Path, *, release: Release | None = None) -> tuple[CheckpointInfo, dict[str, Source]]:
    """Reads the headers of a diffusers folder, or of one component's folder.

    Args:
        path: holds transformer/ or vae/ or both, or latent_upsampler/; or is one of them.
        release: the release that the user says it is.

    Returns:
        The checkpoint's info, and its components' tensors under diffusers' keys.

    Raises:
        CheckpointError: it is not such a folder, or its configs describe another architecture.
    """
    folders = _find_component_folders(path)
    configs = {component: read_json(folder / "config.json") for component, folder in folders.items()}
    sources = {component: Source.open(folder) for component, folder in folders.items()}
    vae = read_vae_config(configs["vae"], folders["vae"]) if "vae" in folders else None
    vae_family = find_vae_family(vae) if vae else None
    transformer = None
    if "transformer" in folders:
        # Whether positions are causal is settled below.
        transformer = read_transformer_config(configs["transformer"], folders["transformer"], causal_positions=True)
    upscaler = read_upscaler_config(configs["upscaler"], folders["upscaler"]) if "upscaler" in folders else None
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    dtype = sources.get("transformer", next(iter(sources.values()))).dtype
    allowed_sigmas = _read_allowed_sigmas(path / "model_index.json")
    facts = ReleaseFacts(
        kind=checkpoint_kind(transformer, upscaler),
        transformer=transformer,
        vae_families=_possible_families(transformer, vae_family, scheduler_file),
        allowed_sigmas=allowed_sigmas,
        stores_fp8=dtype in FP8_DTYPES,
    )
    match = match_release(path, facts, _release_names(path, folders, configs), explicit=release)
    # The family whose positions and sigmas the model follows, with or without a VAE in the folder.
    family = next(iter(facts.vae_families), "0.9.5")
    if transformer is not None:
        family = family if facts.vae_families else family_of_match(path, match)
        transformer = replace(transformer, causal_temporal_positioning=family == "0.9.5")
    schedule = replace(read_schedule(scheduler_file, family), allowed_sigmas=allowed_sigmas)
    info = CheckpointInfo(
        version=match.release.version if match.release else version_label(transformer, vae_family, upscaler),
        release=match.release,
        layout="diffusers",
        transformer=transformer,
        vae=vae,
        vae_family=vae_family,
        schedule=schedule,
        dtype=dtype,
        upscaler=upscaler,
        release_candidates=match.candidates,
        contradicted_name=match.contradicted_name,
    )
    return info, sources


def _possible_families(
    transformer: TransformerConfig | None, vae_family: str | None, scheduler_file: Path
) -> tuple[str, ...]:
    """Returns the VAE families that the model may follow: by its VAE, its size or its scheduler; () if none tells."""
    if vae_family is not None:
        return (vae_family,)
    if transformer is not None and transformer.num_layers == TRANSFORMER_13B.num_layers:
        return ("0.9.5",)
    if transformer is None or not scheduler_file.is_file():
        return ()
    has_shift = read_json(scheduler_file).get("use_dynamic_shifting", False)
    return ("0.9", "0.9.1") if has_shift else ("0.9.5",)


def _release_names(path: Path, folders: Mapping[str, Path], configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the names that may tell the release: of the folder, of its repository, and those in its configs.

    diffusers writes into `_name_or_path` where a model was loaded from before it was saved.
    """
    index = path / "model_index.json"
    stated: list[Mapping[str, Any]] = [read_json(index)] if index.is_file() else []
    stated += [configs["transformer"]] if "transformer" in configs else []
    origins = [PurePosixPath(str(config.get("_name_or_path", "")).replace("\\", "/")) for config in stated]
    names = [origin.parent.name if origin.name in COMPONENT_FOLDERS else origin.name for origin in origins]
    return [*path_names(path, is_component=path in folders.values()), *filter(None, names)]


def read_transformer_config(config: Mapping[str, Any], folder: Path, *, causal_positions: bool) -> TransformerConfig:
    """Reads transformer/config.json; whether positions are causal is not in it."""
    _check_required_values(config, TRANSFORMER_REQUIRED, folder)
    transformer = TransformerConfig(
        num_layers=_get_positive_int(config, "num_layers", folder),
        num_heads=_get_positive_int(config, "num_attention_heads", folder),
        head_dim=_get_positive_int(config, "attention_head_dim", folder),
        caption_channels=_get_positive_int(config, "caption_channels", folder),
        in_channels=config.get("in_channels", 128),
        causal_temporal_positioning=causal_positions,
    )
    implied = {"cross_attention_dim": transformer.width, "out_channels": transformer.in_channels}
    _check_required_values({key: config.get(key) or value for key, value in implied.items()}, implied, folder)
    return transformer


def read_vae_config(config: Mapping[str, Any], folder: Path) -> VAEConfig:
    """Reads vae/config.json.

    Raises:
        CheckpointError: it is built as none of the three families.
    """
    _check_required_values(config, VAE_REQUIRED, folder)
    try:
        timestep_conditioning = bool(config.get("timestep_conditioning", False))
        encoder_blocks, encoder_width = _encoder_blocks(config)
        decoder_blocks, decoder_width = _decoder_blocks(config)
        vae = VAEConfig(
            encoder_blocks=encoder_blocks,
            decoder_blocks=decoder_blocks,
            timestep_conditioning=timestep_conditioning,
            latent_channels=config.get("latent_channels", 128),
            patch_size=config.get("patch_size", 4),
            encoder_base_channels=encoder_width,
            decoder_base_channels=decoder_width,
        )
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe an LTX-Video VAE: {quote(error)}. Use the folder as released."
        ) from error
    if find_vae_family(vae) is None:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a VAE that is built as none of 0.9, 0.9.1 and 0.9.5; diffusers' keys "
            "are known for these only. Use the official single file of this model."
        )
    return vae


def read_upscaler_config(config: Mapping[str, Any], folder: Path) -> UpscalerConfig:
    """Reads latent_upsampler/config.json, which has the keys of the official header."""
    try:
        return UpscalerConfig.from_header({key: value for key, value in config.items() if not key.startswith("_")})
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def read_schedule(file: Path, vae_family: str) -> Schedule:
    """Reads scheduler_config.json; without one, returns the schedule of the VAE family.

    Without dynamic shifting the official schedule is linear-quadratic, which diffusers computes outside its scheduler.
    """
    if not file.is_file():
        return FAMILY_SCHEDULES[vae_family]
    return parse_schedule(read_json(file), file)


def parse_schedule(config: Mapping[str, Any], file: Path) -> Schedule:
    """Returns the schedule that the content of a scheduler_config.json means; see `read_schedule`."""
    if not config.get("use_dynamic_shifting", False):
        return FAMILY_SCHEDULES["0.9.5"]
    _check_required_values(config, SHIFT_REQUIRED, file)
    if config.get("time_shift_type", "exponential") != "exponential":
        raise CheckpointError(f"{file} shifts by {quote(config['time_shift_type'])}; kadr knows only 'exponential'.")
    return replace(FAMILY_SCHEDULES["0.9"], shift_terminal=config.get("shift_terminal"))


def _read_allowed_sigmas(file: Path) -> tuple[float, ...] | None:
    """Reads the sigmas that model_index.json restricts the model to; None where it does not."""
    sigmas = read_json(file).get(ALLOWED_SIGMAS_KEY) if file.is_file() else None
    if sigmas is None:
        return None
    if not isinstance(sigmas, list) or not all(isinstance(sigma, float | int) for sigma in sigmas):
        raise CheckpointError(f"{file}: {ALLOWED_SIGMAS_KEY} must be a list of numbers. Download it again.")
    return tuple(float(sigma) for sigma in sigmas)


def _encoder_blocks(config: Mapping[str, Any]) -> tuple[tuple[BlockConfig, ...], int]:
    """Returns the blocks of the encoder and the width it starts with."""
    widths = config.get("block_out_channels", (128, 256, 512, 512))
    layer_counts = config.get("layers_per_block", (4, 3, 3, 3, 4))
    scaling = config.get("spatio_temporal_scaling", (True, True, True, False))
    is_0_9_5 = str(config.get("down_block_types", ("LTXVideoDownBlock3D",))[-1]) == "LTXVideo095DownBlock3D"
    kinds = config.get("downsample_type", ("conv",) * len(scaling))
    next_widths = widths[1:] if is_0_9_5 else (*widths[1:], widths[-1])
    levels = zip(widths, next_widths, layer_counts, scaling, kinds, strict=False)
    blocks = []
    for width, next_width, num_layers, scales, kind in levels:
        blocks.append(BlockConfig(kind="res_x", num_layers=num_layers))
        if scales and is_0_9_5:
            blocks.append(BlockConfig(kind=DOWNSAMPLE_KINDS[kind], multiplier=_channel_multiplier(next_width, width)))
        elif scales:
            blocks.append(BlockConfig(kind="compress_all"))
        if not is_0_9_5 and next_width != width:
            blocks.append(BlockConfig(kind="res_x_y", multiplier=_channel_multiplier(next_width, width)))
    return (*blocks, BlockConfig(kind="res_x", num_layers=layer_counts[-1])), widths[0]


def _decoder_blocks(config: Mapping[str, Any]) -> tuple[tuple[BlockConfig, ...], int]:
    """Returns the blocks of the decoder, in the order of the encoder, and the width it ends with."""
    widths = config.get("decoder_block_out_channels", (128, 256, 512, 512))
    layer_counts = config.get("decoder_layers_per_block", (4, 3, 3, 3, 4))
    scaling = config.get("decoder_spatio_temporal_scaling", (True, True, True, False))
    inject_noise = config.get("decoder_inject_noise", (False,) * len(layer_counts))
    residual = config.get("upsample_residual", (False,) * len(widths))
    factors = config.get("upsample_factor", (1,) * len(widths))
    input_widths, output_widths = _compute_decoder_widths(widths, factors)
    blocks = []
    for i, width in enumerate(output_widths):
        blocks.append(BlockConfig(kind="res_x", num_layers=layer_counts[i], inject_noise=inject_noise[i]))
        if scaling[i]:
            blocks.append(BlockConfig(kind="compress_all", multiplier=factors[i], residual=residual[i]))
        if input_widths[i] // factors[i] != width:
            multiplier = _channel_multiplier(input_widths[i] // factors[i], width)
            blocks.append(BlockConfig(kind="res_x_y", multiplier=multiplier, inject_noise=inject_noise[i]))
    last_block = BlockConfig(kind="res_x", num_layers=layer_counts[-1], inject_noise=inject_noise[-1])
    return (*blocks, last_block), output_widths[0]


def _compute_decoder_widths(widths: Sequence[int], factors: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the input and output widths of the decoder's levels, in the order of the encoder."""
    output_widths = [width // factor for width, factor in zip(widths, factors, strict=True)]
    input_widths = [*output_widths[1:], widths[-1]]  # of the block that runs before, which stands after it here
    return input_widths, output_widths


def _channel_multiplier(next_width: int, width: int) -> int:
    multiplier, rest = divmod(next_width, width)
    if rest or not multiplier:
        raise ValueError(f"{next_width} channels are not a multiple of {width}")
    return multiplier


def _find_component_folders(path: Path) -> dict[str, Path]:
    """Returns component -> its folder."""
    folders = {component: path / name for component, name in COMPONENT_FOLDERS.items() if (path / name).is_dir()}
    if not folders and (path / "config.json").is_file():
        class_name = str(read_json(path / "config.json").get("_class_name"))
        if class_name in COMPONENT_BY_CLASS:
            return {COMPONENT_BY_CLASS[class_name]: path}
        if "T5" in str(read_json(path / "config.json").get("architectures")):
            raise CheckpointError(
                f"{path} is a T5 text encoder, not a model. Open the model, and give this folder as --text-encoder."
            )
    if not folders:
        files = sorted(entry.name for entry in path.glob("*.safetensors"))
        way_out = f"Name one of the files in it: {', '.join(files[:5])}." if files else "Name a .safetensors instead."
        names = ", ".join(f"{name}/" for name in COMPONENT_FOLDERS.values())
        raise CheckpointError(f"{path} is not a diffusers folder: it has none of {names} in it. {way_out}")
    for component, folder in folders.items():
        class_name = str(read_json(folder / "config.json").get("_class_name"))
        if class_name.startswith(_LTX2_CLASS_PREFIXES) or class_name.endswith("LTX2Video"):
            raise CheckpointError(f"{path} is LTX-2, another family of models ({class_name}). kadr runs 0.9 to 0.9.8.")
        if COMPONENT_BY_CLASS.get(class_name) != component:
            raise CheckpointError(
                f"{folder} has a {class_name}; kadr runs {', '.join(COMPONENT_BY_CLASS)}, "
                "which are LTX-Video 0.9 to 0.9.8."
            )
    return folders


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        config = parse_json(read_text(file))
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
            raise CheckpointError(
                f"{folder} has {key} = {quote(config[key])} in its config; kadr knows only {quote(value)}."
            )


def _get_positive_int(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder} has {key} = {quote(value)} in its config; it must be a positive whole number.")
    return value
