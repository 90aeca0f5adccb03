"""Sizes of a video VAE, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from kadr.errors import CheckpointError
from kadr.quoting import quote, show
from kadr.validation import check_config_count, check_config_flag

Strides = tuple[int, int, int]  # over frames, rows, columns

BLOCK_STRIDES: Mapping[str, Strides] = {
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
    "compress_all": (2, 2, 2),
    "compress_time_res": (2, 1, 1),
    "compress_space_res": (1, 2, 2),
    "compress_all_res": (2, 2, 2),
}
ENCODER_BLOCK_KINDS = ("res_x", "res_x_y", *BLOCK_STRIDES)
DECODER_BLOCK_KINDS = ("res_x", "res_x_y", "compress_time", "compress_space", "compress_all")
# Keys of the header that change the computation, with the only value that released weights use.
VAE_FIXED_VALUES: Mapping[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "normalize_latent_channels": False,
    "spatial_padding_mode": "zeros",
    "scaling_factor": 1.0,
}
# Largest sizes in a config, several times the released ones.
_MAX_LAYERS, _MAX_MULTIPLIER, _MAX_BLOCKS, _MAX_CHANNELS = 64, 8, 64, 1 << 14
_MAX_VAE_SIZES = {
    "latent_channels": 4096,
    "patch_size": 32,
    "encoder_base_channels": 4096,
    "decoder_base_channels": 4096,
}
REQUIRED_KEYS = ("latent_log_var", "norm_layer", "use_quant_conv")


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One entry of a block list, in the order of the encoder.

    Args:
        kind: its name in the header.
        num_layers: residual blocks of a "res_x".
        multiplier: output channels per input channel, in the encoder's direction.
        residual: a decoder's "compress_all" adds its input, rearranged, to its output.
        inject_noise: the residual blocks add noise with a learned scale per channel.
    """

    kind: str
    num_layers: int = 0
    multiplier: int = 1
    residual: bool = False
    inject_noise: bool = False

    def __post_init__(self) -> None:
        check_config_count("VAE", f"num_layers of {self.kind}", self.num_layers, _MAX_LAYERS, minimum=0)
        check_config_count("VAE", f"multiplier of {self.kind}", self.multiplier, _MAX_MULTIPLIER)
        for name in ("residual", "inject_noise"):
            check_config_flag("VAE", f"{name} of {self.kind}", getattr(self, name))

    @property
    def strides(self) -> Strides:
        return BLOCK_STRIDES.get(self.kind, (1, 1, 1))

    @classmethod
    def from_header(cls, entry: Sequence[Any], *, list_name: str, allowed_kinds: Sequence[str]) -> BlockConfig:
        """Reads ["res_x", 4] or ["compress_all", {"residual": true, "multiplier": 2}]."""
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise CheckpointError(f"the VAE's {list_name} contain {quote(entry)}; a block is a pair of kind and size.")
        kind, detail = entry
        if not isinstance(kind, str) or kind not in allowed_kinds:
            known = ", ".join(allowed_kinds)
            raise CheckpointError(f"the VAE's {list_name} contain a block {quote(kind)}; known are {known}.")
        detail = _read_detail(kind, detail)
        default_multiplier = 2 if kind == "res_x_y" or kind.endswith("_res") else 1
        block = cls(
            kind=kind,
            num_layers=detail.pop("num_layers", 0),
            multiplier=detail.pop("multiplier", default_multiplier),
            residual=detail.pop("residual", False),
            inject_noise=detail.pop("inject_noise", False),
        )
        if detail:
            unknown = ", ".join(map(str, detail))
            raise CheckpointError(
                f"the VAE's {list_name} set {show(unknown)} on {quote(kind)}, which kadr does not know."
            )
        return block

    def to_header(self) -> list[Any]:
        """Returns the entry as the official header writes it."""
        if self.kind == "res_x":
            return [self.kind, {"num_layers": self.num_layers, "inject_noise": self.inject_noise}]
        detail: dict[str, Any] = {"multiplier": self.multiplier}
        if self.kind == "compress_all":
            detail["residual"] = self.residual
        if self.kind == "res_x_y":
            detail["inject_noise"] = self.inject_noise
        return [self.kind, detail]


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of a VAE. Both block lists are in the order of the encoder; the decoder runs its list backwards."""

    encoder_blocks: tuple[BlockConfig, ...]
    decoder_blocks: tuple[BlockConfig, ...]
    timestep_conditioning: bool
    latent_channels: int = 128
    patch_size: int = 4
    encoder_base_channels: int = 128
    decoder_base_channels: int = 128

    def __post_init__(self) -> None:
        for name, maximum in _MAX_VAE_SIZES.items():
            check_config_count("VAE", name, getattr(self, name), maximum)
        check_config_flag("VAE", "timestep_conditioning", self.timestep_conditioning)
        for name, blocks in (("encoder_blocks", self.encoder_blocks), ("decoder_blocks", self.decoder_blocks)):
            time = prod(block.strides[0] for block in blocks)
            space = prod(block.strides[1] for block in blocks) * self.patch_size
            if (time, space) != (8, 32):
                raise CheckpointError(
                    f"the VAE's {name} with patches of {self.patch_size} reduce time {time} and space {space} times; "
                    "the family reduces them 8 and 32 times."
                )
            channels = getattr(self, name.replace("blocks", "base_channels"))
            channels *= prod(block.multiplier for block in blocks)
            check_config_count("VAE", f"channels after its {name}", channels, _MAX_CHANNELS)

    @property
    def decoder_start_channels(self) -> int:
        return self.decoder_base_channels * prod(block.multiplier for block in self.decoder_blocks)

    @property
    def injects_noise(self) -> bool:
        return any(block.inject_noise for block in self.decoder_blocks)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> VAEConfig:
        """Reads the "vae" entry of an official header.

        Raises:
            CheckpointError: a value that no released weights use, or an unknown block.
        """
        for key, value in VAE_FIXED_VALUES.items():
            found = header.get(key, None if key in REQUIRED_KEYS else value)
            if found != value:
                raise CheckpointError(f"the VAE's header has {key} = {quote(found)}; kadr knows only {quote(value)}.")
        shared = header.get("blocks", ())
        encoder, decoder = header.get("encoder_blocks", shared), header.get("decoder_blocks", shared)
        for name, blocks in (("encoder_blocks", encoder), ("decoder_blocks", decoder)):
            if not isinstance(blocks, list | tuple) or len(blocks) > _MAX_BLOCKS:
                raise CheckpointError(
                    f"the VAE has {name} = {quote(blocks)}; it must be a list of at most {_MAX_BLOCKS} blocks."
                )
        return cls(
            encoder_blocks=tuple(
                BlockConfig.from_header(b, list_name="encoder_blocks", allowed_kinds=ENCODER_BLOCK_KINDS)
                for b in encoder
            ),
            decoder_blocks=tuple(
                BlockConfig.from_header(b, list_name="decoder_blocks", allowed_kinds=DECODER_BLOCK_KINDS)
                for b in decoder
            ),
            timestep_conditioning=header.get("timestep_conditioning", False),
            latent_channels=header["latent_channels"],
            patch_size=header.get("patch_size", 1),
            encoder_base_channels=header.get("encoder_base_channels", 128),
            decoder_base_channels=header.get("decoder_base_channels", 128),
        )

    def to_header(self) -> dict[str, Any]:
        """Returns the "vae" entry of an official header."""
        return {
            **VAE_FIXED_VALUES,
            "latent_channels": self.latent_channels,
            "patch_size": self.patch_size,
            "encoder_base_channels": self.encoder_base_channels,
            "decoder_base_channels": self.decoder_base_channels,
            "encoder_blocks": [block.to_header() for block in self.encoder_blocks],
            "decoder_blocks": [block.to_header() for block in self.decoder_blocks],
            "timestep_conditioning": self.timestep_conditioning,
        }


def _read_detail(kind: str, detail: Any) -> dict[str, Any]:
    """Returns the settings of a block in the header, of which only "res_x" has a number of layers."""
    detail = {"num_layers": detail} if isinstance(detail, int) else dict(detail)
    if kind != "res_x":
        detail.pop("num_layers", None)  # ["compress_all", 1] is how 0.9 writes a block without layers
    return detail


def _parse_blocks(*entries: tuple[str, Any]) -> tuple[BlockConfig, ...]:
    return tuple(
        BlockConfig.from_header(entry, list_name="released list", allowed_kinds=ENCODER_BLOCK_KINDS)
        for entry in entries
    )


_STRIDED_BLOCKS = _parse_blocks(
    ("res_x", 4), ("compress_all", 1), ("res_x_y", 1), ("res_x", 3), ("compress_all", 1),
    ("res_x_y", 1), ("res_x", 3), ("compress_all", 1), ("res_x", 3), ("res_x", 4),
)  # fmt: skip
_UPSAMPLE_BLOCK = ("compress_all", {"residual": True, "multiplier": 2})

VAE_0_9 = VAEConfig(encoder_blocks=_STRIDED_BLOCKS, decoder_blocks=_STRIDED_BLOCKS, timestep_conditioning=False)
VAE_0_9_1 = VAEConfig(
    encoder_blocks=_STRIDED_BLOCKS,
    decoder_blocks=_parse_blocks(
        ("res_x", {"num_layers": 5, "inject_noise": True}), _UPSAMPLE_BLOCK,
        ("res_x", {"num_layers": 6, "inject_noise": True}), _UPSAMPLE_BLOCK,
        ("res_x", {"num_layers": 7, "inject_noise": True}), _UPSAMPLE_BLOCK, ("res_x", 8),
    ),
    timestep_conditioning=True,
)  # fmt: skip
VAE_0_9_5 = VAEConfig(
    encoder_blocks=_parse_blocks(
        ("res_x", 4), ("compress_space_res", {"multiplier": 2}), ("res_x", 6), ("compress_time_res", {"multiplier": 2}),
        ("res_x", 6), ("compress_all_res", {"multiplier": 2}), ("res_x", 2), ("compress_all_res", {"multiplier": 2}),
        ("res_x", 2),
    ),
    decoder_blocks=_parse_blocks(
        ("res_x", 5), _UPSAMPLE_BLOCK, ("res_x", 5), _UPSAMPLE_BLOCK, ("res_x", 5), _UPSAMPLE_BLOCK, ("res_x", 5),
    ),
    timestep_conditioning=True,
)  # fmt: skip
