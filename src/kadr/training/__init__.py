"""LoRAs, trained on a person's own clips: a folder of them, encoded once, and the low-rank matrices that learn."""
