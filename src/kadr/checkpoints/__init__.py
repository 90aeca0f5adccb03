"""Checkpoint files: reads headers and tensors, detects the model, loads modules, writes and converts files."""
