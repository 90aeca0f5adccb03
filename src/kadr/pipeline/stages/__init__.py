"""Stages of a generation: text encoder, condition encode, sampler, upscale, VAE decode."""
