"""Padding of prompts: the part of a batch that no token needs."""

from __future__ import annotations

from torch import Tensor


def unpadded_length(mask: Tensor, *, multiple_of: int = 1) -> int:
    """Returns the length of a batch without the padding behind its longest text, at most L.

    Where a sample is all padding, that is the whole length: its softmax weights all of its tokens, so each counts.

    Args:
        mask: bool or integer (B, L); true or non-zero for tokens that are not padding.
        multiple_of: keep so much padding that the length is a multiple of this, where there is as much.
    """
    mask = mask.bool()
    if not bool(mask.any(1).all()):
        return mask.shape[1]
    longest = int(mask.any(0).nonzero().max()) + 1
    return min(-(-longest // multiple_of) * multiple_of, mask.shape[1])
