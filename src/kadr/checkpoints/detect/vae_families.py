"""The three families of the video VAE, and the schedule and version that each implies."""

from __future__ import annotations

from collections.abc import Mapping

from kadr.models.transformer import TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG, UpscalerConfig
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5, VAEConfig
from kadr.sampling.schedules import Schedule

VAE_FAMILIES: Mapping[str, VAEConfig] = {"0.9": VAE_0_9, "0.9.1": VAE_0_9_1, "0.9.5": VAE_0_9_5}
_SD3_SHIFTED_SCHEDULE = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)
FAMILY_SCHEDULES: Mapping[str, Schedule] = {
    "0.9": _SD3_SHIFTED_SCHEDULE,
    "0.9.1": _SD3_SHIFTED_SCHEDULE,
    "0.9.5": Schedule(sampler="LinearQuadratic"),
}


def find_vae_family(config: VAEConfig) -> str | None:
    """Finds the family with a VAE's architecture, whatever its widths and layer counts; None if no family has it."""
    return next(
        (family for family, known in VAE_FAMILIES.items() if _architecture(known) == _architecture(config)), None
    )


def _architecture(config: VAEConfig) -> tuple[object, ...]:
    return (
        config.timestep_conditioning,
        tuple(block.kind for block in config.encoder_blocks),
        tuple((block.kind, block.residual, block.inject_noise) for block in config.decoder_blocks),
    )


def version_label(
    transformer: TransformerConfig | None, vae_family: str | None, upscaler: UpscalerConfig | None = None
) -> str:
    """Names the version as precisely as the components allow."""
    if transformer is None and vae_family is None and upscaler in (SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG):
        return "0.9.7 or 0.9.8"
    if vae_family in ("0.9", "0.9.1"):
        return vae_family
    if transformer is None:
        return "0.9.5 or later" if vae_family else "unreleased"
    if transformer.num_layers == TRANSFORMER_13B.num_layers:
        return "0.9.7 or later"
    return "0.9.5 or later" if transformer.causal_temporal_positioning else "0.9 or 0.9.1"
