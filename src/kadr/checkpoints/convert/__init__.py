"""Converts checkpoints between the official single file and a diffusers folder."""
