"""GGUF files: read, written, converted to."""
