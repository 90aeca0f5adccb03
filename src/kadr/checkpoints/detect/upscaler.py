"""Which latent upscaler is in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import RELEASES, Release
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig

MODEL_KIND = "model"  # the kind of what is no upscaler, as the registry names it
_INPUT_CONV, _UPSAMPLE_CONV = "initial_conv.weight", "upsampler.0.weight"
# How many times wider the growing convolution makes it, and over how many sides it goes -> what grows.
_UPSCALED_AXES: Mapping[tuple[int, int], Mapping[str, bool]] = {
    (4, 2): {"spatial_upsample": True, "temporal_upsample": False},
    (2, 3): {"spatial_upsample": False, "temporal_upsample": True},
    (8, 3): {"spatial_upsample": True, "temporal_upsample": True},
}


def checkpoint_kind(transformer: TransformerConfig | None, upscaler: UpscalerConfig | None) -> str:
    """As the registry names it. An upscaler may come with a VAE, as in its diffusers folder."""
    return MODEL_KIND if upscaler is None or transformer is not None else upscaler.kind


def detect_upscaler_config(source: Source, config: Mapping[str, Any]) -> UpscalerConfig:
    """Sizes by header, or by shape where there is none.

    Args:
        source: the upscaler's tensors.
        config: of the header; empty where a file was saved without.

    Raises:
        CheckpointError: neither tells.
    """
    try:
        return UpscalerConfig.from_header(config) if config else _config_from_shapes(source)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def _config_from_shapes(source: Source) -> UpscalerConfig:
    first, growing = (
        source.infos[name].shape if name in source.infos else () for name in (_INPUT_CONV, _UPSAMPLE_CONV)
    )
    if len(first) == 5:
        width, channels = first[:2]
        blocks = {name.split(".")[1] for name in source.infos if name.startswith("res_blocks.")}
        for (times, sides), kind in _UPSCALED_AXES.items():
            if growing[:2] == (times * width, width) and len(growing) == sides + 2:
                return UpscalerConfig(
                    in_channels=channels, mid_channels=width, num_blocks_per_stage=len(blocks), **kind
                )
    raise CheckpointError(
        f"there is no config in its header, and no upscaler of this family has {_INPUT_CONV} of {list(first)} with "
        f"{_UPSAMPLE_CONV} of {list(growing)}. Take the file as it was released."
    )


def find_upscaler_release(stem: str, config: UpscalerConfig) -> Release | None:
    """The upscaler that was released under this file name (without folder and suffix), if this can be it."""
    return next((r for r in RELEASES if r.kind == config.kind and r.file_stem == stem.lower()), None)
