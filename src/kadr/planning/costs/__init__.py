"""Arithmetic of bytes and FLOPs: activations, weights and work of every component, from configs and headers."""
