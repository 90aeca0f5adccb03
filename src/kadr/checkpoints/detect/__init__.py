"""Detection of a checkpoint: by its header, its tensor shapes, then its name."""
