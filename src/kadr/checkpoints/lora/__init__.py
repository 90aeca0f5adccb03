"""LoRA files of every trainer: opened, matched to layers, scaled."""
