"""The latent upscaler (official name: `LatentUpsampler`) doubles the height and width of latents, or their frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
from kadr.errors import CheckpointError
from kadr.models.vae.blocks import depth_to_space
from kadr.models.vae.config import Strides
from kadr.nn.conv import Conv2d, Conv3d
from kadr.quoting import quote
from kadr.validation import check_config_count, check_config_flag

NORM_GROUPS = 32  # groups of every GroupNorm
OFFICIAL_CLASS_NAME = "LatentUpsampler"
# Keys of the header. `in_channels`, `mid_channels` and `dims` have no default: its readers do not agree on one.
_SIZE_KEYS = ("in_channels", "mid_channels", "num_blocks_per_stage")
_MAX_UPSCALER_SIZES = {
    "in_channels": 4096,
    "mid_channels": 1 << 14,
    "num_blocks_per_stage": 64,
}  # several times the released
_FLAG_KEYS = ("spatial_upsample", "temporal_upsample")
_DEFAULTS: Mapping[str, Any] = {"num_blocks_per_stage": 4, "spatial_upsample": True, "temporal_upsample": False}
_DIMS = 3


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """Sizes of an upscaler, and the axes that it upscales.

    Args:
        in_channels: of the latents.
        mid_channels: channels inside.
        num_blocks_per_stage: residual blocks before the upsampling convolution, and as many after it.
        spatial_upsample: doubles rows and columns.
        temporal_upsample: makes 2f - 1 frames from f.
    """

    in_channels: int = 128
    mid_channels: int = 512
    num_blocks_per_stage: int = 4
    spatial_upsample: bool
    temporal_upsample: bool

    def __post_init__(self) -> None:
        for name, maximum in _MAX_UPSCALER_SIZES.items():
            check_config_count("upscaler", name, getattr(self, name), maximum)
        for name in _FLAG_KEYS:
            check_config_flag("upscaler", name, getattr(self, name))
        if not (self.spatial_upsample or self.temporal_upsample):
            raise CheckpointError("the upscaler enlarges neither space nor time; released ones enlarge one of them.")
        if self.mid_channels % NORM_GROUPS:
            raise CheckpointError(
                f"the upscaler has mid_channels = {self.mid_channels}; its norms have {NORM_GROUPS} groups, so it must "
                f"be a multiple of {NORM_GROUPS} (released ones have 512)."
            )

    @property
    def kind(self) -> str:
        """The kind as the registry names it."""
        axes = (("spatial", self.spatial_upsample), ("temporal", self.temporal_upsample))
        return f"{' and '.join(axis for axis, is_upscaled in axes if is_upscaled)} upscaler"

    @property
    def scale_factors(self) -> Strides:
        """Factors for frames, rows and columns. Of the doubled frames the first is then dropped."""
        rows = 2 if self.spatial_upsample else 1
        return (2 if self.temporal_upsample else 1, rows, rows)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> UpscalerConfig:
        """Reads the config of an official header, or a diffusers config.json without its keys that begin with _.

        Raises:
            CheckpointError: a value that no released weights use, or a key that none have, such as those of LTX-2.
        """
        unknown = [
            key
            for key in header
            if not (key in _SIZE_KEYS or key in _FLAG_KEYS or key == "dims" or key.startswith("_"))
        ]
        if unknown:
            raise CheckpointError(
                f"the upscaler's header has {', '.join(unknown)}, which those of LTX-Video do not have (those of LTX-2 "
                "may). Take ltxv-spatial-upscaler-0.9.8 or ltxv-temporal-upscaler-0.9.8."
            )
        for key, value, found in (
            ("_class_name", OFFICIAL_CLASS_NAME, header.get("_class_name", OFFICIAL_CLASS_NAME)),
            ("dims", _DIMS, header.get("dims")),
        ):
            if found != value:
                raise CheckpointError(
                    f"the upscaler's header has {key} = {quote(found)}; kadr knows only {quote(value)}."
                )
        values = {**_DEFAULTS, **header}
        return cls(**{key: values.get(key) for key in (*_SIZE_KEYS, *_FLAG_KEYS)})  # type: ignore[arg-type]

    def to_header(self) -> dict[str, Any]:
        """Returns the config of an official header."""
        values = {key: getattr(self, key) for key in (*_SIZE_KEYS, *_FLAG_KEYS)}
        return {"_class_name": OFFICIAL_CLASS_NAME, "dims": _DIMS, **values}


SPATIAL_UPSCALER_CONFIG = UpscalerConfig(spatial_upsample=True, temporal_upsample=False)
TEMPORAL_UPSCALER_CONFIG = UpscalerConfig(spatial_upsample=False, temporal_upsample=True)


class ResBlock(nn.Module):
    """A residual block of two convolutions. The last activation comes after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, channels), nn.GroupNorm(NORM_GROUPS, channels)
        self.conv2, self.norm2 = _conv(channels, channels), nn.GroupNorm(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the block for x (B, C, F, H, W)."""
        main = self.conv2(F.silu(self.norm1(self.conv1(x))))
        return F.silu(x + self.norm2(main))


class LatentUpscaler(nn.Module):
    """Upscales latents; the official `LatentUpsampler`.

    Its norms take their statistics over a whole video, and its convolutions reach to both sides in time. So a video
    cannot be upscaled in parts, of space or of time, with the same result.
    """

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.config = config
        width, upsampled_width = config.mid_channels, config.mid_channels * prod(config.scale_factors)
        self.conv_in, self.norm_in = _conv(config.in_channels, width), nn.GroupNorm(NORM_GROUPS, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.num_blocks_per_stage))
        # A purely spatial upscaler has the released weights of a convolution over single frames.
        self.upsample_conv = (
            _conv(width, upsampled_width) if config.temporal_upsample else Conv2d(width, upsampled_width, 3, padding=1)
        )
        self.post_upsample_res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.num_blocks_per_stage))
        self.conv_out = _conv(width, config.in_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """Upscales latents (B, C, f, h, w), not normalised -> (B, C, f', h', w'), in the weights' dtype (float32).

        h' = 2h and w' = 2w if the upscaler is spatial, f' = 2f - 1 if it is temporal; the other axes stay as they are.
        """
        x = F.silu(self.norm_in(self.conv_in(latents)))
        for block in self.res_blocks:
            check_cancelled()
            x = block(x)
        check_cancelled()
        x = self._upsample(x)
        for block in self.post_upsample_res_blocks:
            check_cancelled()
            x = block(x)
        return self.conv_out(x)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.config.temporal_upsample:
            # A video's first latent frame stands for one frame and not for eight: doubled, it is one too many.
            return depth_to_space(self.upsample_conv(x), self.config.scale_factors)[:, :, 1:]
        frames = x.transpose(1, 2)
        upsampled = self.upsample_conv(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return depth_to_space(upsampled.transpose(1, 2), self.config.scale_factors)


def _conv(in_channels: int, out_channels: int) -> Conv3d:
    """Returns a convolution with zero padding in space and time."""
    return Conv3d(in_channels, out_channels, 3, padding=1)
