"""The latent upscaler: latents in, latents of twice the height and width or nearly twice the frames out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kadr.errors import CheckpointError
from kadr.models.vae.blocks import depth_to_space
from kadr.models.vae.config import Strides

GROUPS = 32  # of every norm
CLASS_NAME = "LatentUpsampler"
# Entry of the header -> ours. Three have no default: those who read the header do not agree on one.
_SIZES: Mapping[str, str] = {"in_channels": "channels", "mid_channels": "width", "num_blocks_per_stage": "blocks"}
_WAYS: Mapping[str, str] = {"spatial_upsample": "space", "temporal_upsample": "time"}
_DEFAULTS: Mapping[str, Any] = {"num_blocks_per_stage": 4, "spatial_upsample": True, "temporal_upsample": False}
_DIMS = 3


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Sizes of an upscaler, and what it makes larger.

    Args:
        channels: of the latents.
        width: channels inside.
        blocks: residual blocks before the latents grow, and as many after.
        space: twice the rows and columns.
        time: 2f - 1 frames for f.
    """

    channels: int = 128
    width: int = 512
    blocks: int = 4
    space: bool
    time: bool

    def __post_init__(self) -> None:
        if not (self.space or self.time):
            raise CheckpointError("the upscaler makes neither space nor time larger; released ones make one of them.")
        if self.width % GROUPS:
            raise CheckpointError(
                f"the upscaler is {self.width} channels wide inside; its norms take {GROUPS} groups, so it must be a "
                f"multiple of {GROUPS} (released ones have 512)."
            )

    @property
    def kind(self) -> str:
        """As the registry names it."""
        ways = [name for name, grows in (("spatial", self.space), ("temporal", self.time)) if grows]
        return f"{' and '.join(ways)} upscaler"

    @property
    def strides(self) -> Strides:
        """How many frames, rows and columns come of one; of the frames the first is then dropped."""
        rows = 2 if self.space else 1
        return (2 if self.time else 1, rows, rows)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> UpsamplerConfig:
        """Read the config of an official header, or a diffusers config.json without its entries that begin with _.

        Raises:
            CheckpointError: a value that no released weights use, or an entry that none has, as LTX-2's upscalers do.
        """
        strange = [key for key in header if not (key in _SIZES or key in _WAYS or key == "dims" or key.startswith("_"))]
        if strange:
            raise CheckpointError(
                f"the upscaler's header has {', '.join(strange)}, which those of LTX-Video do not have (those of LTX-2 "
                "may). Take ltxv-spatial-upscaler-0.9.8 or ltxv-temporal-upscaler-0.9.8."
            )
        for key, value, found in (
            ("_class_name", CLASS_NAME, header.get("_class_name", CLASS_NAME)),
            ("dims", _DIMS, header.get("dims")),
        ):
            if found != value:
                raise CheckpointError(f"the upscaler's header has {key} = {found!r}; kadr knows only {value!r}.")
        said = {**_DEFAULTS, **header}
        read: dict[str, Any] = {ours: _size(key, said.get(key)) for key, ours in _SIZES.items()}
        return cls(**read, **{ours: _way(key, said[key]) for key, ours in _WAYS.items()})

    def header(self) -> dict[str, Any]:
        """The config of an official header."""
        ours = {**_SIZES, **_WAYS}
        return {"_class_name": CLASS_NAME, "dims": _DIMS, **{key: getattr(self, ours[key]) for key in ours}}


def _size(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"the upscaler's header has {key} = {value!r}; it must be a positive whole number.")
    return value


def _way(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"the upscaler's header has {key} = {value!r}; it must be true or false.")
    return value


SPATIAL = UpsamplerConfig(space=True, time=False)
TEMPORAL = UpsamplerConfig(space=False, time=True)


class Block(nn.Module):
    """Two convolutions beside a residual path. The last activation comes after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width, width), nn.GroupNorm(GROUPS, width)
        self.conv2, self.norm2 = _conv(width, width), nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, F, H, W)."""
        main = self.conv2(F.silu(self.norm1(self.conv1(x))))
        return F.silu(x + self.norm2(main))


class LatentUpsampler(nn.Module):
    """Makes latents larger.

    Its norms take their statistics over a whole video and its convolutions look to both sides in time, so neither
    pieces of a picture nor pieces of a video can be upscaled apart and give the same.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, grown = config.width, config.width * prod(config.strides)
        self.conv_in, self.norm_in = _conv(config.channels, width), nn.GroupNorm(GROUPS, width)
        self.before = nn.ModuleList(Block(width) for _ in range(config.blocks))
        # Where only space grows, the released weights are those of a convolution over single frames.
        self.grow = _conv(width, grown) if config.time else nn.Conv2d(width, grown, 3, padding=1)
        self.after = nn.ModuleList(Block(width) for _ in range(config.blocks))
        self.conv_out = _conv(width, config.channels)

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, f, h, w), not normalised -> (B, C, f', h', w'), in the dtype of the weights (float32).

        h' = 2h and w' = 2w where the upscaler is spatial, f' = 2f - 1 where it is temporal; the rest stays.
        """
        x = F.silu(self.norm_in(self.conv_in(latents)))
        for block in self.before:
            x = block(x)
        x = self._grown(x)
        for block in self.after:
            x = block(x)
        return self.conv_out(x)

    def _grown(self, x: Tensor) -> Tensor:
        if (
            self.config.time
        ):  # a video's first latent stands for one frame and not for eight: doubled, it is one too many
            return depth_to_space(self.grow(x), self.config.strides)[:, :, 1:]
        frames = x.transpose(1, 2)
        grown = self.grow(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return depth_to_space(grown.transpose(1, 2), self.config.strides)


def _conv(channels_in: int, channels_out: int) -> nn.Conv3d:
    """Zeros around the video, in time too."""
    return nn.Conv3d(channels_in, channels_out, 3, padding=1)
