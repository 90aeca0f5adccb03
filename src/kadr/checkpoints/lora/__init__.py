"""Reads LoRA files in the key formats of all common trainers."""
