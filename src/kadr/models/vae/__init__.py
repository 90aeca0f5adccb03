"""The causal video VAE in its three families: 0.9, 0.9.1, and 0.9.5, which the models from 0.9.5 to 0.9.8 share."""

from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.models.vae.model import VAE, Moments

__all__ = ["VAE", "BlockConfig", "Moments", "VAEConfig"]
