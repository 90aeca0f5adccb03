"""Which latent upscaler is in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import RELEASES, Release
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig

MODEL = "model"  # the kind of what is no upscaler, as the registry names it
_FIRST, _GROWING = "initial_conv.weight", "upsampler.0.weight"
# How many times wider the growing convolution makes it, and over how many sides it goes -> what grows.
_KINDS: Mapping[tuple[int, int], Mapping[str, bool]] = {
    (4, 2): {"space": True, "time": False},
    (2, 3): {"space": False, "time": True},
    (8, 3): {"space": True, "time": True},
}


def kind_of(transformer: TransformerConfig | None, upsampler: UpscalerConfig | None) -> str:
    """As the registry names it. An upscaler may come with a VAE, as in its diffusers folder."""
    return MODEL if upsampler is None or transformer is not None else upsampler.kind


def read_upsampler(part: Source, config: Mapping[str, Any]) -> UpscalerConfig:
    """Sizes by header, or by shape where there is none.

    Args:
        part: the upscaler's tensors.
        config: of the header; empty where a file was saved without.

    Raises:
        CheckpointError: neither tells.
    """
    try:
        return UpscalerConfig.from_header(config) if config else _by_shape(part)
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error


def _by_shape(part: Source) -> UpscalerConfig:
    first, growing = (part.infos[name].shape if name in part.infos else () for name in (_FIRST, _GROWING))
    if len(first) == 5:
        width, channels = first[:2]
        blocks = {name.split(".")[1] for name in part.infos if name.startswith("res_blocks.")}
        for (times, sides), kind in _KINDS.items():
            if growing[:2] == (times * width, width) and len(growing) == sides + 2:
                return UpscalerConfig(
                    in_channels=channels, mid_channels=width, num_blocks_per_stage=len(blocks), **kind
                )
    raise CheckpointError(
        f"there is no config in its header, and no upscaler of this family has {_FIRST} of {list(first)} with "
        f"{_GROWING} of {list(growing)}. Take the file as it was released."
    )


def released_upscaler(stem: str, config: UpscalerConfig) -> Release | None:
    """The upscaler that was released under this file name (without folder and suffix), if this can be it."""
    return next((r for r in RELEASES if r.kind == config.kind and r.file_stem == stem.lower()), None)
