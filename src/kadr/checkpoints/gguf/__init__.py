"""Reads and writes GGUF files, and converts checkpoints to GGUF."""
