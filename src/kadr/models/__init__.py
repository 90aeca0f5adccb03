"""The networks (transformer, video VAE, text encoder, latent upscaler) and the registry of releases. Opens no files."""
