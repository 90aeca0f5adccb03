"""Layers whose weight stays as it is stored, and becomes plain numbers only while it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kadr.kernels import fp8, fused, int8
from kadr.kernels.fused import dequantize
from kadr.kernels.ggml_types import Packing
from kadr.kernels.hadamard import rotate
from kadr.kernels.matmul import linear, linear_gelu
from kadr.nn.linear import EndsInGelu, Prepares

PIECE = 262_144  # numbers that are converted at a time: what stays in a core's cache


class Scratch:
    """The buffer that all weights of a module are unpacked into, one after the other.

    For a module that runs its layers in turn, as all of kadr's do: a weight is gone when the next one comes.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) of numbers without meaning, in the dtype and on the device of `like`."""
        place = (like.device, like.dtype)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop(place, None)  # before the larger one is made
            buffer = self._buffers[place] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return buffer[: rows * columns].view(rows, columns)

    def clear(self) -> None:
        """Let go of the buffer. It comes back when it is needed."""
        self._buffers.clear()


def clear_scratch(module: nn.Module) -> None:
    """Let go of what a module's weights were unpacked into: nobody else can use it while the module waits."""
    for child in module.modules():
        if isinstance(child, StoredLinear):
            child.scratch.clear()


class StoredLinear(EndsInGelu):
    """y = x Wᵀ + b, with W unpacked into the scratch buffer for the time of the product."""

    def __init__(self, outputs: int, columns: int, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__()
        self.outputs, self.columns, self.scratch = outputs, columns, scratch
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.unpacked(x), self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.unpacked(x), self.bias)

    def unpacked(self, x: Tensor) -> Tensor:
        """The weight (outputs, columns) in the dtype of x, until another layer's is asked for."""
        weight = self.scratch.take(self.outputs, self.columns, x)
        self.unpack(weight)
        return weight

    def unpack(self, out: Tensor) -> None:
        """Write the weight into `out` (outputs, columns)."""
        raise NotImplementedError


class PackedLinear(StoredLinear):
    """Its weight lies in the blocks of GGML. packed: uint8 (outputs, bytes of a row)."""

    packed: Tensor

    def __init__(self, packed: Tensor, packing: Packing, columns: int, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__(len(packed), columns, bias, scratch)
        self.packing = packing
        self.register_buffer("packed", packed)

    def unpack(self, out: Tensor) -> None:
        dequantize(self.packed, self.packing, out)


class ScaledLinear(StoredLinear):
    """Its weight lies in 8-bit floats, in 8-bit whole numbers, or in another float dtype than is computed in.

    Args:
        weight: (outputs, columns).
        scale: fp32 (outputs, 1) or (1, 1), which the stored numbers are multiplied with; None for 1.
        rotation: the weight was turned before it was stored, along its columns in blocks of so many; see `rotate`. What
            comes in is then turned likewise, and the product is that of the two unturned.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, scratch: Scratch, rotation: int | None = None
    ) -> None:
        outputs, columns = weight.shape
        super().__init__(outputs, columns, bias, scratch)
        self.rotation = rotation
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._turned(x))

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return super().with_gelu(self._turned(x))

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else rotate(x, self.rotation)

    def unpack(self, out: Tensor) -> None:
        convert(self.weight, self.scale, out)


class Codes(NamedTuple):
    """Activations (R, K) in 8 bits and their scales (R, 1), with the shape around the rows and the dtype they had."""

    numbers: Tensor
    scales: Tensor
    around: torch.Size
    dtype: torch.dtype


class EightBitLinear(Prepares):
    """The product itself is in 8 bits. weight: (outputs, columns), scale: fp32 (outputs)."""

    product: ClassVar[Callable[..., Tensor]]  # codes by codes, scaled
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.finished(self.prepared(x))

    def prepared(self, x: Tensor, *, gelu: bool = False) -> Codes:
        """x (..., K), or its GELU, in 8 bits."""
        rows, kind = x.reshape(-1, x.shape[-1]), self.weight.dtype
        numbers, scales = fused.gelu_quantize(rows, kind) if gelu else fused.quantize_rows(rows, kind)
        return Codes(numbers, scales, x.shape[:-1], x.dtype)

    def unpacked(self, x: Tensor) -> Tensor:
        """The weight (outputs, columns) in the dtype of x."""
        made = x.new_empty(self.weight.shape)
        convert(self.weight, self.scale[:, None], made)
        return made

    def finished(self, codes: Codes) -> Tensor:
        """The product (..., O)."""
        made = self.product(codes.numbers, codes.scales, self.weight, self.scale, self.bias, codes.dtype)
        return made.view(*codes.around, -1)


class Int8Linear(EightBitLinear):
    """See `kernels.int8`. weight: int8."""

    product = staticmethod(int8.product)


class Fp8Linear(EightBitLinear):
    """See `kernels.fp8`. weight: float8_e4m3fn."""

    product = staticmethod(fp8.product)


class StoredEmbedding(nn.Module):
    """An embedding in the blocks of GGML: only the rows that are looked up are unpacked. packed: uint8 (rows, ...)."""

    packed: Tensor

    def __init__(self, packed: Tensor, packing: Packing, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.packing, self.width, self.dtype = packing, width, dtype
        self.register_buffer("packed", packed)

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., width)
        rows = self.packed[ids.flatten()]
        made = torch.empty(len(rows), self.width, dtype=self.dtype, device=rows.device)
        dequantize(rows, self.packing, made)
        return made.view(*ids.shape, self.width)


def convert(weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Write weight * scale into `out`, rounded once. weight (rows, columns) in any dtype, scale (rows or 1, 1)."""
    if scale is None:
        out.copy_(weight)
        return
    step = max(1, PIECE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        piece = slice(start, start + step)
        own = scale if len(scale) == 1 else scale[piece]
        out[piece] = weight[piece].float().mul_(own)
