"""What a checkpoint is: told from its header, its tensor shapes, then its name."""
