"""Layers whose weight stays as it is stored, and becomes plain numbers only while it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kadr.kernels import fp8, fused, int8
from kadr.kernels.fused import dequantize
from kadr.kernels.ggml_types import GGMLType
from kadr.kernels.hadamard import hadamard_transform
from kadr.kernels.matmul import linear, linear_gelu
from kadr.nn.linear import FusedGELU, QuantizesInput

DEQUANT_SLICE_ELEMENTS = 262_144  # numbers that are converted at a time: what stays in a core's cache


class Scratch:
    """The buffer that all weights of a module are unpacked into, one after the other.

    For a module that runs its layers in turn, as all of kadr's do: a weight is gone when the next one comes.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get_buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
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
        if isinstance(child, DequantizingLinear):
            child.scratch.clear()


class DequantizingLinear(FusedGELU):
    """y = x Wᵀ + b, with W unpacked into the scratch buffer for the time of the product."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__()
        self.out_features, self.in_features, self.scratch = out_features, in_features, scratch
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dequantize_weight(x), self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.dequantize_weight(x), self.bias)

    def dequantize_weight(self, x: Tensor) -> Tensor:
        """The weight (outputs, columns) in the dtype of x, until another layer's is asked for."""
        weight = self.scratch.get_buffer(self.out_features, self.in_features, x)
        self.dequantize_into(weight)
        return weight

    def dequantize_into(self, out: Tensor) -> None:
        """Write the weight into `out` (outputs, columns)."""
        raise NotImplementedError


class GGMLLinear(DequantizingLinear):
    """Its weight lies in the blocks of GGML. packed: uint8 (outputs, bytes of a row)."""

    quantized_weight: Tensor

    def __init__(
        self, quantized_weight: Tensor, ggml_type: GGMLType, in_features: int, bias: Tensor | None, scratch: Scratch
    ) -> None:
        super().__init__(len(quantized_weight), in_features, bias, scratch)
        self.ggml_type = ggml_type
        self.register_buffer("quantized_weight", quantized_weight)

    def dequantize_into(self, out: Tensor) -> None:
        dequantize(self.quantized_weight, self.ggml_type, out)


class ScaledLinear(DequantizingLinear):
    """Its weight lies in 8-bit floats, in 8-bit whole numbers, or in another float dtype than is computed in.

    Args:
        weight: (outputs, columns).
        scale: fp32 (outputs, 1) or (1, 1), which the stored numbers are multiplied with; None for 1.
        rotation_size: the weight was turned before it was stored, along its columns in blocks of so many; see `rotate`. What
            comes in is then turned likewise, and the product is that of the two unturned.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        scratch: Scratch,
        rotation_size: int | None = None,
    ) -> None:
        outputs, columns = weight.shape
        super().__init__(outputs, columns, bias, scratch)
        self.rotation_size = rotation_size
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._rotate_input(x))

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return super().with_gelu(self._rotate_input(x))

    def _rotate_input(self, x: Tensor) -> Tensor:
        return x if self.rotation_size is None else hadamard_transform(x, self.rotation_size)

    def dequantize_into(self, out: Tensor) -> None:
        rescale_into(self.weight, self.scale, out)


class QuantizedInput(NamedTuple):
    """Activations (R, K) in 8 bits and their scales (R, 1), with the shape around the rows and the dtype they had."""

    codes: Tensor
    row_scales: Tensor
    leading_shape: torch.Size
    dtype: torch.dtype


class W8A8Linear(QuantizesInput):
    """The product itself is in 8 bits. weight: (outputs, columns), scale: fp32 (outputs)."""

    scaled_matmul: ClassVar[Callable[..., Tensor]]  # codes by codes, scaled
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(self.quantize_input(x))

    def quantize_input(self, x: Tensor, *, gelu: bool = False) -> QuantizedInput:
        """x (..., K), or its GELU, in 8 bits."""
        rows, kind = x.reshape(-1, x.shape[-1]), self.weight.dtype
        numbers, scales = fused.gelu_quantize(rows, kind) if gelu else fused.quantize_rows(rows, kind)
        return QuantizedInput(numbers, scales, x.shape[:-1], x.dtype)

    def dequantize_weight(self, x: Tensor) -> Tensor:
        """The weight (outputs, columns) in the dtype of x."""
        made = x.new_empty(self.weight.shape)
        rescale_into(self.weight, self.scale[:, None], made)
        return made

    def matmul(self, quantized: QuantizedInput) -> Tensor:
        """The product (..., O)."""
        made = self.scaled_matmul(
            quantized.codes, quantized.row_scales, self.weight, self.scale, self.bias, quantized.dtype
        )
        return made.view(*quantized.leading_shape, -1)


class Int8Linear(W8A8Linear):
    """See `kernels.int8`. weight: int8."""

    scaled_matmul = staticmethod(int8.scaled_matmul)


class Fp8Linear(W8A8Linear):
    """See `kernels.fp8`. weight: float8_e4m3fn."""

    scaled_matmul = staticmethod(fp8.scaled_matmul)


class GGMLEmbedding(nn.Module):
    """An embedding in the blocks of GGML: only the rows that are looked up are unpacked. packed: uint8 (rows, ...)."""

    quantized_weight: Tensor

    def __init__(self, quantized_weight: Tensor, ggml_type: GGMLType, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ggml_type, self.embedding_dim, self.dtype = ggml_type, embedding_dim, dtype
        self.register_buffer("quantized_weight", quantized_weight)

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., width)
        rows = self.quantized_weight[ids.flatten()]
        made = torch.empty(len(rows), self.embedding_dim, dtype=self.dtype, device=rows.device)
        dequantize(rows, self.ggml_type, made)
        return made.view(*ids.shape, self.embedding_dim)


def rescale_into(weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Write weight * scale into `out`, rounded once. weight (rows, columns) in any dtype, scale (rows or 1, 1)."""
    if scale is None:
        out.copy_(weight)
        return
    step = max(1, DEQUANT_SLICE_ELEMENTS // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        piece = slice(start, start + step)
        own = scale if len(scale) == 1 else scale[piece]
        out[piece] = weight[piece].float().mul_(own)
