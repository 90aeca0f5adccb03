"""The networks: transformer, video VAE, text encoder, latent upscaler. No file, device or rank is known here."""
