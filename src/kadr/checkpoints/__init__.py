"""Files to tensors to modules."""

from kadr.checkpoints.open import Checkpoint, Description, Part, TextEncoderFolder

__all__ = ["Checkpoint", "Description", "Part", "TextEncoderFolder"]
