"""Diffusion as mathematics: no model, no file."""
