"""Modules at the paths that scripts import them from in diffusers."""
