"""The causal video VAE in its three families: 0.9, 0.9.1 and 0.9.5 (which 0.9.5 to 0.9.8 share)."""

from kadr.models.vae.config import Block, VAEConfig
from kadr.models.vae.model import VAE, Moments

__all__ = ["VAE", "Block", "Moments", "VAEConfig"]
