"""Linear layers: the one seam where weights may be quantized or prepacked, and where LoRAs are added.

A replacement of `Linear` may also fuse two things: quantize an input once for all layers that share it, and compute the
GELU between two layers as part of the matmul before or after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kadr.kernels import fused
from kadr.kernels.matmul import linear, linear_gelu


class QuantizesInput(nn.Module):
    """A layer that quantizes its input before the matmul. Layers of one type can share a quantized input."""

    def quantize_input(self, x: Tensor, *, gelu: bool = False) -> Any:
        """Quantizes x, or gelu(x), for `matmul`."""
        raise NotImplementedError

    def quantize_modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        """Quantizes the input of a branch, `fused.norm_modulate` of x (B, N, D), for `matmul`."""
        return self.quantize_input(fused.norm_modulate(x, scale, shift))

    def quantize_next(
        self, x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Any]:
        """Ends a branch by `fused.gate_residual`, and quantizes the input of the next for `matmul`."""
        x = fused.gate_residual(x, gate, branch)
        return x, self.quantize_modulated(x, scale, shift)

    def matmul(self, quantized: Any) -> Tensor:
        """Returns the output of the layer for a quantized input."""
        raise NotImplementedError


class Quantized(NamedTuple):
    """An input that is quantized already, for layers of one weight format."""

    value: Any


class FusedGELU(nn.Module):
    """A layer that computes gelu(x Wᵀ + b) at little more than the cost of x Wᵀ + b."""

    def with_gelu(self, x: Tensor) -> Tensor:
        """Computes gelu(x Wᵀ + b), with the tanh form of GELU."""
        raise NotImplementedError


class Linear(nn.Linear, FusedGELU):
    """y = x Wᵀ + b. Quantization and prepacking replace instances of this class and of no other."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """Computes gelu(x Wᵀ + b), with the tanh form of GELU."""
        return linear_gelu(x, self.weight, self.bias)


class _LoraInput(NamedTuple):
    """Input of a LoRA layer: quantized for the base layer where that quantizes, and as it is for the LoRA."""

    base_input: Any
    x: Tensor


class LoRALinear(QuantizesInput):
    """y = base(x) + B S A x: a layer with its LoRAs. The base may be stored in any weight format.

    All LoRAs of a layer are one product: their A matrices stacked by rows, their B matrices by columns, and S diagonal
    with their strengths. While S is 0, only `base` is computed.

    Args:
        base: the layer that the LoRAs add to.
        down: A, (R, K): R is the sum of all ranks, K the inputs.
        up: B, (O, R): O are the outputs.
    """

    down: Tensor
    up: Tensor
    segments: tuple[tuple[int, float, int], ...]  # of each LoRA: its index, scale and rank

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.scale: Tensor | None = None
        self._host_scale = torch.zeros(len(down))

    def set_scale(self, scale: Tensor, device: torch.device) -> bool:
        """Sets the diagonal of S and returns whether that changed it.

        An equal S keeps its tensor, whose address CUDA graphs have recorded. It is not a buffer: block swapping copies
        buffers asynchronously, and a change could arrive too late.

        Args:
            scale: fp32 (R), on the CPU.
            device: that of x.
        """
        is_on_device = self.scale is None or self.scale.device.type == device.type
        if is_on_device and torch.equal(scale, self._host_scale):
            return False
        self._host_scale = scale
        self.scale = scale.to(device) if bool(scale.any()) else None
        return True

    @property
    def is_active(self) -> bool:
        """True where S is not 0."""
        return self.scale is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(self.quantize_input(x)) if self.is_active else self.base(x)

    def quantize_input(self, x: Tensor, *, gelu: bool = False) -> _LoraInput:
        """Prepares x, or gelu(x), for `matmul`: quantized for the base layer, plain for the LoRAs."""
        activated = F.gelu(x, approximate="tanh") if gelu else x
        base_input = self.base.quantize_input(x, gelu=gelu) if isinstance(self.base, QuantizesInput) else activated
        return _LoraInput(base_input, activated)

    def matmul(self, lora_input: _LoraInput) -> Tensor:
        """Returns base(x) + B S A x."""
        base = self.base
        out: Tensor = (
            base.matmul(lora_input.base_input) if isinstance(base, QuantizesInput) else base(lora_input.base_input)
        )
        assert self.scale is not None
        low_rank = linear(lora_input.x, self.down, None)
        return out + linear((low_rank * self.scale).to(low_rank.dtype), self.up, None)


def active_layer(layer: nn.Module) -> nn.Module:
    """Returns the layer, or its base where it is a LoRA layer whose strengths are all 0."""
    return layer.base if isinstance(layer, LoRALinear) and not layer.is_active else layer


def uses_8bit_matmul(layer: nn.Module) -> bool:
    """Tells whether a layer computes its matmul in 8 bits."""
    return isinstance(layer.base if isinstance(layer, LoRALinear) else layer, QuantizesInput)


def _shared_quantizer(layers: tuple[nn.Module, ...]) -> QuantizesInput | None:
    """Returns the layer that quantizes the input of all these active layers; None where each takes it as it is."""
    first = layers[0]
    if isinstance(first, QuantizesInput) and all(type(layer) is type(first) for layer in layers):
        return first
    return None


def modulated_input(x: Tensor, scale: Tensor, shift: Tensor, *layers: nn.Module) -> Tensor | Quantized:
    """Returns the input of a branch that begins with these layers: norm and modulation of x, and quantization.

    Args:
        x: (B, N, D).
        scale, shift: see `fused.norm_modulate`.
        layers: of one weight format. `linear_shared_input` and `mlp` take the result for them.
    """
    quantizer = _shared_quantizer(tuple(map(active_layer, layers)))
    if quantizer is None:
        return fused.norm_modulate(x, scale, shift)
    return Quantized(quantizer.quantize_modulated(x, scale, shift))


def next_modulated_input(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, *layers: nn.Module
) -> tuple[Tensor, Tensor | Quantized]:
    """Ends a branch by `fused.gate_residual` and returns its result, and `modulated_input` of that."""
    quantizer = _shared_quantizer(tuple(map(active_layer, layers)))
    if quantizer is None:
        return fused.gate_residual_norm_modulate(x, gate, branch, scale, shift)
    x, quantized = quantizer.quantize_next(x, gate, branch, scale, shift)
    return x, Quantized(quantized)


def linear_shared_input(x: Tensor | Quantized, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Applies layers of one weight format to the same x. Quantizes x only once where they allow it."""
    layers = tuple(map(active_layer, layers))
    if isinstance(x, Tensor):
        quantizer = _shared_quantizer(layers)
        if quantizer is None:
            return tuple(layer(x) for layer in layers)
        x = Quantized(quantizer.quantize_input(x))
    return tuple(layer.matmul(x.value) for layer in layers if isinstance(layer, QuantizesInput))


def mlp(up: nn.Module, down: nn.Module, x: Tensor | Quantized) -> Tensor:
    """Computes down(gelu(up(x))), with the tanh form of GELU."""
    up, down = active_layer(up), active_layer(down)
    if isinstance(up, FusedGELU) and isinstance(x, Tensor):
        out: Tensor = down(up.with_gelu(x))
        return out
    (hidden,) = linear_shared_input(x, up)
    if isinstance(down, QuantizesInput):
        out = down.matmul(down.quantize_input(hidden, gelu=True))
    else:
        out = down(F.gelu(hidden, approximate="tanh"))
    return out
