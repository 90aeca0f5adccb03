"""How the velocities with and without the prompt become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """An encoded prompt: encoding (B, L, T) and mask (B, L), true where it is not padding."""

    encoding: Tensor
    mask: Tensor


Model = Callable[[Tensor, Tensor, Text], Tensor]  # tokens (B, N, C), level (B, 1 or N), text -> velocity (B, N, C)
Estimate = Callable[[Tensor, Tensor], Tensor]


def plain(model: Model, text: Text) -> Estimate:
    """The model's velocity, unguided."""
    return lambda tokens, level: model(tokens, level, text)


def classifier_free(model: Model, text: Text, negative: Text, scale: float, *, together: bool = False) -> Estimate:
    """v = v_negative + scale · (v_text - v_negative) (Ho and Salimans 2022, arXiv:2207.12598).

    Args:
        together: evaluate both in one batch: twice the activations, fewer kernel launches, the same numbers.
    """

    def estimate(tokens: Tensor, level: Tensor) -> Tensor:
        if together:
            both = Text(*(torch.cat(pair) for pair in zip(negative, text, strict=True)))
            without, with_text = model(torch.cat([tokens, tokens]), torch.cat([level, level]), both).chunk(2)
        else:
            without, with_text = model(tokens, level, negative), model(tokens, level, text)
        return without + scale * (with_text - without)

    return estimate
