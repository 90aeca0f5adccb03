"""Layers with quantized weights: dequantized for each use (weight only), or multiplied in 8 bits (W8A8)."""

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

DEQUANT_SLICE_ELEMENTS = 262_144  # rescaled at a time, so that they stay in a core's cache


class Scratch:
    """A buffer that the weights of a module are dequantized into, one after the other.

    For modules that run their layers in sequence, as all of kadr's do: the next weight overwrites the last.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get_buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Returns an uninitialised tensor (rows, columns) with the dtype and device of `like`."""
        key = (like.device, like.dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop(key, None)  # frees it before the larger one is allocated
            buffer = self._buffers[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return buffer[: rows * columns].view(rows, columns)

    def clear(self) -> None:
        """Frees the buffer. It is allocated again when it is needed."""
        self._buffers.clear()


def clear_scratch(module: nn.Module) -> None:
    """Frees the scratch buffers of a module, which nothing else can use while the module is idle."""
    for child in module.modules():
        if isinstance(child, DequantizingLinear):
            child.scratch.clear()


def uses_scratch(module: nn.Module) -> bool:
    """Returns whether a module dequantizes weights into scratch buffers."""
    return any(isinstance(child, DequantizingLinear) for child in module.modules())


class DequantizingLinear(FusedGELU):
    """Linear layer y = x Wᵀ + b whose W is dequantized into the scratch buffer for each use."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__()
        self.out_features, self.in_features, self.scratch = out_features, in_features, scratch
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dequantize_weight(x), self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """Computes gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.dequantize_weight(x), self.bias)

    def dequantize_weight(self, x: Tensor) -> Tensor:
        """Returns the weight (out_features, in_features) in x's dtype, valid until the scratch buffer is reused."""
        weight = self.scratch.get_buffer(self.out_features, self.in_features, x)
        self.dequantize_into(weight)
        return weight

    def dequantize_into(self, out: Tensor) -> None:
        """Writes the weight into `out` (out_features, in_features)."""
        raise NotImplementedError


class GGMLLinear(DequantizingLinear):
    """Linear layer with a weight in GGML's blocks. quantized_weight: uint8 (out_features, bytes per row)."""

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
    """Linear layer with a weight in 8-bit floats, 8-bit integers, or another float dtype than that of its input.

    Args:
        weight: (out_features, in_features).
        scale: fp32 (out_features, 1) or (1, 1), a factor of the stored values; None for 1.
        rotation_size: the weight is Hadamard-rotated in blocks of this many columns; see `rotation`. The input is
            rotated likewise, so that the output is that of the weight before rotation.
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
        out_features, in_features = weight.shape
        super().__init__(out_features, in_features, bias, scratch)
        self.rotation_size = rotation_size
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._rotate_input(x))

    def with_gelu(self, x: Tensor) -> Tensor:
        """Computes gelu(x Wᵀ + b), in the tanh form."""
        return super().with_gelu(self._rotate_input(x))

    def _rotate_input(self, x: Tensor) -> Tensor:
        return x if self.rotation_size is None else hadamard_transform(x, self.rotation_size)

    def dequantize_into(self, out: Tensor) -> None:
        rescale_into(self.weight, self.scale, out)


class QuantizedInput(NamedTuple):
    """Activations (R, K) in 8 bits and their scales (R, 1), with their leading shape and dtype before."""

    codes: Tensor
    row_scales: Tensor
    leading_shape: torch.Size
    dtype: torch.dtype


class W8A8Linear(QuantizesInput):
    """Linear layer that multiplies in 8 bits. weight: (out_features, in_features), scale: fp32 (out_features)."""

    scaled_matmul: ClassVar[Callable[..., Tensor]]  # see `int8.scaled_matmul`
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
        """Quantizes x (..., K), or its GELU, to 8 bits per row."""
        rows, code_dtype = x.reshape(-1, x.shape[-1]), self.weight.dtype
        codes, scales = fused.gelu_quantize(rows, code_dtype) if gelu else fused.quantize_rows(rows, code_dtype)
        return QuantizedInput(codes, scales, x.shape[:-1], x.dtype)

    def quantize_modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> QuantizedInput:
        """See `QuantizesInput.quantize_modulated`: one kernel on GPUs."""
        codes, scales = fused.norm_modulate_quantize(x, scale, shift, self.weight.dtype)
        return QuantizedInput(codes.flatten(0, -2), scales.flatten(0, -2), x.shape[:-1], x.dtype)

    def quantize_next(
        self, x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, QuantizedInput]:
        """See `QuantizesInput.quantize_next`: one kernel on GPUs."""
        arguments = (x, gate, branch, scale, shift)
        x, codes, scales = fused.gate_residual_norm_modulate_quantize(*arguments, self.weight.dtype)
        return x, QuantizedInput(codes.flatten(0, -2), scales.flatten(0, -2), x.shape[:-1], x.dtype)

    def dequantize_weight(self, x: Tensor) -> Tensor:
        """Returns the weight (out_features, in_features) in the dtype of x."""
        weight = x.new_empty(self.weight.shape)
        rescale_into(self.weight, self.scale[:, None], weight)
        return weight

    def matmul(self, quantized: QuantizedInput) -> Tensor:
        """Multiplies a quantized input with the weight and adds the bias -> (..., O)."""
        output = self.scaled_matmul(
            quantized.codes, quantized.row_scales, self.weight, self.scale, self.bias, quantized.dtype
        )
        return output.view(*quantized.leading_shape, -1)


class Int8Linear(W8A8Linear):
    """Linear layer in 8-bit integers; see `kernels.int8`. weight: int8."""

    scaled_matmul = staticmethod(int8.scaled_matmul)


class Fp8Linear(W8A8Linear):
    """Linear layer in 8-bit floats; see `kernels.fp8`. weight: float8_e4m3fn."""

    scaled_matmul = staticmethod(fp8.scaled_matmul)


class GGMLEmbedding(nn.Module):
    """Embedding in GGML's blocks; only the rows looked up are dequantized. quantized_weight: uint8 (rows, ...)."""

    quantized_weight: Tensor

    def __init__(self, quantized_weight: Tensor, ggml_type: GGMLType, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ggml_type, self.embedding_dim, self.dtype = ggml_type, embedding_dim, dtype
        self.register_buffer("quantized_weight", quantized_weight)

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., embedding_dim)
        rows = self.quantized_weight[ids.flatten()]
        embeddings = torch.empty(len(rows), self.embedding_dim, dtype=self.dtype, device=rows.device)
        dequantize(rows, self.ggml_type, embeddings)
        return embeddings.view(*ids.shape, self.embedding_dim)


def rescale_into(weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Writes weight * scale into `out`, rounded once. weight (rows, columns) in any dtype, scale (rows or 1, 1)."""
    if scale is None:
        out.copy_(weight)
        return
    step = max(1, DEQUANT_SLICE_ELEMENTS // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        row_scales = scale if len(scale) == 1 else scale[rows]
        out[rows] = weight[rows].float().mul_(row_scales)
