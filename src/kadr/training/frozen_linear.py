"""Weights that do not learn, however they are stored: gradients pass through them to what comes before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kadr.kernels.hadamard import hadamard_transform
from kadr.quant.layers import DequantizingLinear, ScaledLinear, W8A8Linear


class FrozenLinear(nn.Module):
    """A layer whose weight is unpacked once for the product, and once more for its gradient.

    torch would keep every unpacked weight until then, and those are what was saved by storing them in fewer bits. Of
    products in 8 bits the gradient is that of the unrounded input: rounding has none.
    """

    def __init__(self, base: DequantizingLinear | W8A8Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and x.requires_grad
        made: Tensor = _FrozenMatmul.apply(x, self.base_layer) if learning else self.base_layer(x)
        return made


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, base: nn.Module) -> Tensor:
        context.base = base
        made: Tensor = base(x)
        return made

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return unrotate_gradient(gradient @ context.base.dequantize_weight(gradient), context.base), None


def unrotate_gradient(gradient: Tensor, base: nn.Module) -> Tensor:
    """The gradient of what came in, where that was turned before the product; see `ScaledLinear`."""
    if isinstance(base, ScaledLinear) and base.rotation_size is not None:
        return hadamard_transform(gradient, base.rotation_size)
    return gradient


def freeze_base(module: nn.Module) -> None:
    """Have gradients pass through all layers of a module whose weights are stored in fewer bits."""
    module.requires_grad_(False)
    for name, child in list(module.named_modules()):
        if isinstance(child, DequantizingLinear | W8A8Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, FrozenLinear(child))
