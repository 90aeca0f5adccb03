"""LoRA training on a user's own clips: a folder of them, encoded once, and the low-rank matrices trained on it."""
