"""The one seam where weights may be stored other than as plain numbers, and where others may be added to them.

What stands in the place of a `Linear` may also do two things faster than it can: begin with what several layers share
of one input, and take the GELU between two layers into the product before or after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kadr.kernels.matmul import linear, linear_gelu


class QuantizesInput(nn.Module):
    """A layer whose input is changed first, in a way that does not depend on its weight."""

    def quantize_input(self, x: Tensor, *, gelu: bool = False) -> Any:
        """What `finished` takes; of gelu(x) where asked."""
        raise NotImplementedError

    def matmul(self, quantized: Any) -> Tensor:
        """The layer's outcome."""
        raise NotImplementedError


class FusedGELU(nn.Module):
    """A layer that gives gelu(x Wᵀ + b) for little more than x Wᵀ + b."""

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        raise NotImplementedError


class Linear(nn.Linear, FusedGELU):
    """y = x Wᵀ + b. Quantization and packing replace instances of this class and of no other."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.weight, self.bias)


class _LoraInput(NamedTuple):
    """What the layer underneath takes, and the input itself."""

    base_input: Any
    x: Tensor


class LoRALinear(QuantizesInput):
    """y = base(x) + B S A x: a layer and what LoRAs add to it, whatever its own weight is stored as.

    The LoRAs of a layer are one: the rows of their A stand under each other, the columns of their B side by side, and S
    is diagonal. While S is 0 the layer stands aside: what is computed is `base`, and nothing else.

    Args:
        base: the layer.
        down: A, (R, K): ranks of all LoRAs, inputs.
        up: B, (O, R).
    """

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.scale: Tensor | None = None

    def set_scale(self, scale: Tensor) -> None:
        """Take another S. scale: its diagonal, fp32 (R), where x will lie.

        It is no buffer: those of a streamed block are on their way to and fro, and one that is changed may come late.
        """
        self.scale = scale if bool(scale.any()) else None

    @property
    def is_active(self) -> bool:
        """Whether S is anything but 0."""
        return self.scale is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(self.quantize_input(x)) if self.is_active else self.base(x)

    def quantize_input(self, x: Tensor, *, gelu: bool = False) -> _LoraInput:
        """What `finished` takes; of gelu(x) where asked."""
        activated = F.gelu(x, approximate="tanh") if gelu else x
        own = self.base.quantize_input(x, gelu=gelu) if isinstance(self.base, QuantizesInput) else activated
        return _LoraInput(own, activated)

    def matmul(self, lora_input: _LoraInput) -> Tensor:
        """The sum of the two."""
        base = self.base
        made: Tensor = (
            base.matmul(lora_input.base_input) if isinstance(base, QuantizesInput) else base(lora_input.base_input)
        )
        assert self.scale is not None
        low = linear(lora_input.x, self.down, None)
        return made + linear((low * self.scale).to(low.dtype), self.up, None)


def active_layer(layer: nn.Module) -> nn.Module:
    """The layer, or the one underneath where nothing is added to it."""
    return layer.base if isinstance(layer, LoRALinear) and not layer.is_active else layer


def uses_8bit_matmul(layer: nn.Module) -> bool:
    """Whether a layer's products are in 8 bits."""
    return isinstance(layer.base if isinstance(layer, LoRALinear) else layer, QuantizesInput)


def linear_shared_input(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of some layers, all stored alike, makes of one x."""
    layers = tuple(map(active_layer, layers))
    first = layers[0]
    if not isinstance(first, QuantizesInput) or any(type(layer) is not type(first) for layer in layers):
        return tuple(layer(x) for layer in layers)
    prepared = first.quantize_input(x)
    return tuple(layer.matmul(prepared) for layer in layers if isinstance(layer, QuantizesInput))


def mlp(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    """down(gelu(up(x))), in the tanh form."""
    up, down = active_layer(up), active_layer(down)
    if isinstance(up, FusedGELU):
        made: Tensor = down(up.with_gelu(x))
    elif isinstance(down, QuantizesInput):
        made = down.matmul(down.quantize_input(up(x), gelu=True))
    else:
        made = down(F.gelu(up(x), approximate="tanh"))
    return made
