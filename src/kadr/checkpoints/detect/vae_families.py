"""The three families of the video VAE, and what follows from one where a checkpoint does not say it."""

from __future__ import annotations

from collections.abc import Mapping

from kadr.models.transformer import TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG, UpscalerConfig
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5, VAEConfig
from kadr.sampling.schedules import Schedule

VAE_FAMILIES: Mapping[str, VAEConfig] = {"0.9": VAE_0_9, "0.9.1": VAE_0_9_1, "0.9.5": VAE_0_9_5}
_SHIFTED = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)
SCHEDULES: Mapping[str, Schedule] = {
    "0.9": _SHIFTED,
    "0.9.1": _SHIFTED,
    "0.9.5": Schedule(sampler="LinearQuadratic"),
}


def family_of(config: VAEConfig) -> str | None:
    """Which of the three families a VAE is built as, whatever its widths and layer counts; None for another build."""
    return next((family for family, known in VAE_FAMILIES.items() if _build(known) == _build(config)), None)


def _build(config: VAEConfig) -> tuple[object, ...]:
    return (
        config.timestep_conditioning,
        tuple(block.kind for block in config.encoder_blocks),
        tuple((block.kind, block.residual, block.inject_noise) for block in config.decoder_blocks),
    )


def version_label(
    transformer: TransformerConfig | None, family: str | None, upsampler: UpscalerConfig | None = None
) -> str:
    """The version as far as the components tell it."""
    if transformer is None and family is None and upsampler in (SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG):
        return "0.9.7 or 0.9.8"
    if family in ("0.9", "0.9.1"):
        return family
    if transformer is None:
        return "0.9.5 or later" if family else "unreleased"
    if transformer.num_layers == TRANSFORMER_13B.num_layers:
        return "0.9.7 or later"
    return "0.9.5 or later" if transformer.causal_temporal_positioning else "0.9 or 0.9.1"
