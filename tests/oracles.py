"""Official and diffusers modules that share the weights of ours, mapped by the key tables.

All modules are built on the meta device; ours gets random weights, and the oracles use the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from torch import Tensor, nn

from kadr.checkpoints import keys
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.vae import VAE, VAEConfig
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5

Module = TypeVar("Module", bound=nn.Module)

VAES: Mapping[str, VAEConfig] = {"0.9": VAE_0_9, "0.9.1": VAE_0_9_1, "0.9.5": VAE_0_9_5}

_STRIDED_ENCODER: Mapping[str, Any] = {
    "block_out_channels": (1, 2, 4, 4),
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "downsample_type": ("conv",) * 4,
    "layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
}
_UNFOLDING_DECODER: Mapping[str, Any] = {
    "decoder_block_out_channels": (2, 4, 8),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
# vae/config.json of the released diffusers folders, with widths in units of the first one.
DIFFUSERS_VAES: Mapping[str, Mapping[str, Any]] = {
    "0.9": {
        **_STRIDED_ENCODER,
        "decoder_block_out_channels": (1, 2, 4, 4),
        "decoder_layers_per_block": (4, 3, 3, 3, 4),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "timestep_conditioning": False,
    },
    "0.9.1": {
        **_STRIDED_ENCODER,
        **_UNFOLDING_DECODER,
        "decoder_layers_per_block": (5, 6, 7, 8),
        "decoder_inject_noise": (True, True, True, False),
    },
    "0.9.5": {
        **_UNFOLDING_DECODER,
        "block_out_channels": (1, 2, 4, 8, 16),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "layers_per_block": (4, 6, 6, 2, 2),
        "spatio_temporal_scaling": (True, True, True, True),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "decoder_inject_noise": (False,) * 4,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}


def narrow_vae_config(config: VAEConfig, *, width: int = 16, latent_channels: int = 12) -> VAEConfig:
    """Returns a config with the same blocks and few channels."""
    return replace(config, encoder_base_channels=width, decoder_base_channels=width, latent_channels=latent_channels)


# Weights


def _share_weights(oracle: Module, ours: nn.Module, names: Mapping[str, str]) -> Module:
    state = {names[name]: weight for name, weight in ours.state_dict().items()}
    nn.Module.load_state_dict(oracle, state, strict=True, assign=True)
    return oracle.eval().requires_grad_(False)


# Oracles


def official_vae_on_meta(config: VAEConfig) -> CausalVideoAutoencoder:
    """Builds it from our header; registers the statistics as its loader does when a file has them."""
    with torch.device("meta"):
        model = CausalVideoAutoencoder.from_config(config.to_header())
        model.register_buffer("mean_of_means", torch.empty(config.latent_channels))
        model.register_buffer("std_of_means", torch.empty(config.latent_channels))
    return model


def official_vae(ours: VAE) -> CausalVideoAutoencoder:
    names = keys.map_keys(keys.VAE_KEYS, ours.state_dict())
    names |= {"statistics.mean": "mean_of_means", "statistics.std": "std_of_means"}  # their names in the loaded module
    return _share_weights(official_vae_on_meta(ours.config), ours, names)


def diffusers_vae_on_meta(config: VAEConfig, family: str) -> AutoencoderKLLTXVideo:
    widths = {
        "block_out_channels": config.encoder_base_channels,
        "decoder_block_out_channels": config.decoder_base_channels,
    }
    released = dict(DIFFUSERS_VAES[family])
    for name, unit in widths.items():
        released[name] = tuple(unit * multiplier for multiplier in released[name])
    with torch.device("meta"):
        return AutoencoderKLLTXVideo(latent_channels=config.latent_channels, patch_size=config.patch_size, **released)


def diffusers_vae(ours: VAE, family: str) -> AutoencoderKLLTXVideo:
    names = keys.map_keys(keys.VAE_KEYS, ours.state_dict(), is_diffusers=True, diffusers_vae_family=family)
    return _share_weights(diffusers_vae_on_meta(ours.config, family), ours, names)


def official_transformer_on_meta(config: TransformerConfig) -> Transformer3DModel:
    with torch.device("meta"):
        return Transformer3DModel.from_config(config.to_header())


def official_transformer(ours: Transformer) -> Transformer3DModel:
    names = keys.map_keys(keys.TRANSFORMER_KEYS, ours.state_dict())
    return _share_weights(official_transformer_on_meta(ours.config), ours, names)


def diffusers_transformer_on_meta(config: TransformerConfig) -> LTXVideoTransformer3DModel:
    with torch.device("meta"):
        return LTXVideoTransformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            cross_attention_dim=config.width,
            num_layers=config.num_layers,
            caption_channels=config.caption_channels,
        )


def diffusers_transformer(ours: Transformer) -> LTXVideoTransformer3DModel:
    names = keys.map_keys(keys.TRANSFORMER_KEYS, ours.state_dict(), is_diffusers=True)
    return _share_weights(diffusers_transformer_on_meta(ours.config), ours, names)


# Helpers


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Returns ||ours - expected|| / ||expected||, in fp64. Refuses shapes that would broadcast."""
    assert ours.shape == expected.shape
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Draws standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
