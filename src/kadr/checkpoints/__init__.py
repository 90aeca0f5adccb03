"""Checkpoint files: headers, detection, tensors, and modules loaded from them."""
