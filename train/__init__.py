"""The demo model's training, from scratch: its scenes, the training of each network, the export."""
