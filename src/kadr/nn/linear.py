"""The one seam where weights may be stored other than as plain numbers.

What stands in the place of a `Linear` may also do two things faster than it can: begin with what several layers share
of one input, and take the GELU between two layers into the product before or after it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kadr.kernels.products import linear, linear_gelu


class Prepares(nn.Module):
    """A layer whose input is changed first, in a way that does not depend on its weight."""

    def prepared(self, x: Tensor, *, gelu: bool = False) -> Any:
        """What `finished` takes; of gelu(x) where asked."""
        raise NotImplementedError

    def finished(self, prepared: Any) -> Tensor:
        """The layer's outcome."""
        raise NotImplementedError


class EndsInGelu(nn.Module):
    """A layer that gives gelu(x Wᵀ + b) for little more than x Wᵀ + b."""

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        raise NotImplementedError


class Linear(nn.Linear, EndsInGelu):
    """y = x Wᵀ + b. Quantization and packing replace instances of this class and of no other."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.weight, self.bias)


def several(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of some layers, all stored alike, makes of one x."""
    first = layers[0]
    if not isinstance(first, Prepares) or any(type(layer) is not type(first) for layer in layers):
        return tuple(layer(x) for layer in layers)
    prepared = first.prepared(x)
    return tuple(layer.finished(prepared) for layer in layers if isinstance(layer, Prepares))


def through_gelu(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    """down(gelu(up(x))), in the tanh form."""
    if isinstance(up, EndsInGelu):
        made: Tensor = down(up.with_gelu(x))
    elif isinstance(down, Prepares):
        made = down.finished(down.prepared(up(x), gelu=True))
    else:
        made = down(F.gelu(up(x), approximate="tanh"))
    return made
