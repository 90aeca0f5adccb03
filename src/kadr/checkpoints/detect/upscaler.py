"""Detects the latent upscaler in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import RELEASES, Release
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig

MODEL_KIND = "model"  # the registry's kind of a checkpoint that is not an upscaler
_INPUT_CONV, _UPSAMPLE_CONV = "initial_conv.weight", "upsampler.0.weight"
# Channel factor of the upsampling convolution and its number of spatial axes -> the axes it upsamples.
_UPSCALED_AXES: Mapping[tuple[int, int], Mapping[str, bool]] = {
    (4, 2): {"spatial_upsample": True, "temporal_upsample": False},
    (2, 3): {"spatial_upsample": False, "temporal_upsample": True},
    (8, 3): {"spatial_upsample": True, "temporal_upsample": True},
}


def checkpoint_kind(transformer: TransformerConfig | None, upscaler: UpscalerConfig | None) -> str:
    """Returns the registry's kind. An upscaler may come with a VAE, as in its diffusers folder."""
    return MODEL_KIND if upscaler is None or transformer is not None else upscaler.kind


def detect_upscaler_config(source: Source, config: Mapping[str, Any]) -> UpscalerConfig:
    """Reads the config from the header, or from the shapes where there is none.

    Args:
        source: the upscaler's tensors.
        config: config in the header; empty where the file has none.

    Raises:
        CheckpointError: neither describes a known upscaler.
    """
    try:
        return UpscalerConfig.from_header(config) if config else _config_from_shapes(source)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def _config_from_shapes(source: Source) -> UpscalerConfig:
    input_shape, upsample_shape = (
        source.infos[name].shape if name in source.infos else () for name in (_INPUT_CONV, _UPSAMPLE_CONV)
    )
    if len(input_shape) == 5:
        width, channels = input_shape[:2]
        blocks = {name.split(".")[1] for name in source.infos if name.startswith("res_blocks.")}
        for (channel_factor, num_axes), axes in _UPSCALED_AXES.items():
            if upsample_shape[:2] == (channel_factor * width, width) and len(upsample_shape) == num_axes + 2:
                return UpscalerConfig(
                    in_channels=channels, mid_channels=width, num_blocks_per_stage=len(blocks), **axes
                )
    raise CheckpointError(
        f"there is no config in its header, and no upscaler of this family has {_INPUT_CONV} of {list(input_shape)} "
        f"with {_UPSAMPLE_CONV} of {list(upsample_shape)}. Use the file as released."
    )


def find_upscaler_release(stem: str, config: UpscalerConfig) -> Release | None:
    """Finds the upscaler release with this file stem and this config's kind."""
    return next(
        (release for release in RELEASES if release.kind == config.kind and release.file_stem == stem.lower()), None
    )
