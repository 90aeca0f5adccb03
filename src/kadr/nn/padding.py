"""Padding of prompts: the part of a batch that no token needs."""

from __future__ import annotations

from torch import Tensor


def unpadded_length(mask: Tensor) -> int:
    """Returns the length of a batch without the padding behind its longest text.

    Where a sample is all padding, that is the whole length: its softmax weights all of its tokens, so each counts.

    Args:
        mask: bool or integer (B, L); true or non-zero for tokens that are not padding.
    """
    mask = mask.bool()
    if not bool(mask.any(1).all()):
        return mask.shape[1]
    return int(mask.any(0).nonzero().max()) + 1
