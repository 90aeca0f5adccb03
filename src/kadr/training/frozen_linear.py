"""Frozen quantized layers that pass gradients through to their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kadr.kernels.hadamard import hadamard_transform
from kadr.quant.layers import DequantizingLinear, ScaledLinear, W8A8Linear


class FrozenLinear(nn.Module):
    """A layer that dequantizes its weight once for the product, and once more for the gradient of its input.

    Plain autograd would save every dequantized weight for the backward pass: the very memory that quantization saved.
    The gradient of an 8-bit product is that of the unrounded input: rounding has none.
    """

    def __init__(self, base: DequantizingLinear | W8A8Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        output: Tensor = _FrozenMatmul.apply(x, self.base_layer) if needs_gradient else self.base_layer(x)
        return output


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, base: nn.Module) -> Tensor:
        context.base = base
        output: Tensor = base(x)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return unrotate_gradient(gradient @ context.base.dequantize_weight(gradient), context.base), None


def unrotate_gradient(gradient: Tensor, base: nn.Module) -> Tensor:
    """Returns the gradient of a layer's input, where the layer Hadamard-rotates it first; see `ScaledLinear`."""
    if isinstance(base, ScaledLinear) and base.rotation_size is not None:
        return hadamard_transform(gradient, base.rotation_size)
    return gradient


def freeze_base(module: nn.Module) -> None:
    """Freezes all weights of a module, and wraps its quantized layers in `FrozenLinear` so that gradients pass."""
    module.requires_grad_(False)
    for name, child in list(module.named_modules()):
        if isinstance(child, DequantizingLinear | W8A8Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, FrozenLinear(child))
