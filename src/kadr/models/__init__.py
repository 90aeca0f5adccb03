"""The networks of the family: video VAE, transformer, text encoder. No file, device or rank is known here."""
