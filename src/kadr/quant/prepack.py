"""Prepacking: weights in the memory order that this CPU's kernels read, with equal values.

oneDNN reorders a weight before every matmul; for one that is used many times, reordering once is faster. A prepacked
matrix takes as many bytes as the plain one, and the four kernels of a convolution a third more; see
`kernels.cpu.winograd`. The plain weights are released.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
from kadr.kernels import mode
from kadr.kernels.cpu import int8, tokens, winograd
from kadr.kernels.cpu.malloc import mmap_large_allocations
from kadr.kernels.int8 import has_int8_units
from kadr.kernels.matmul import has_bf16_units, linear, linear_gelu
from kadr.nn.conv import KERNEL_SIZE, CausalConv3d, ChunkedConv3d
from kadr.nn.linear import FusedGELU, Linear, QuantizesInput
from kadr.quant.convert import ReleaseTensors, release_nothing
from kadr.quant.layers import Int8Linear

# Bytes of the prepacked kernels over those of the weight, by output frames at a time.
WINOGRAD_BYTES_RATIO = {winograd.F23: 4 / 3, winograd.F43: 2.0}


def should_prepack_linears(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether prepacking linear layers pays: in bfloat16, on CPUs with units for it."""
    return dtype == torch.bfloat16 and has_bf16_units() and _is_enabled(device)


def should_prepack_convs(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether prepacking convolutions pays for a dtype on a device."""
    return (dtype == torch.float32 or should_prepack_linears(dtype, device)) and _is_enabled(device)


def _is_enabled(device: torch.device) -> bool:
    return device.type == "cpu" and mode.current() != mode.REFERENCE and _has_onednn_avx()


@cache
def _has_onednn_avx() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class PrepackedLinear(FusedGELU):
    """Linear layer in bfloat16 with a prepacked W; its GELU, if any, comes before the sums are rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.prepacked_weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.prepacked_weight, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """Computes gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.prepacked_weight, self.bias)


class PrepackedInt8Linear(QuantizesInput):
    """`Int8Linear` through oneDNN; see `kernels.cpu.int8`."""

    scale: Tensor

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.prepacked_weight = int8.prepack_weight(layer.weight)
        self.register_buffer("scale", layer.scale)
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(self.quantize_input(x))

    def quantize_input(self, x: Tensor, *, gelu: bool = False) -> tuple[int8.UnsignedRows, torch.Size]:
        """Quantizes x (..., K), or its GELU, to 8 bits per row. Returns the rows and the leading shape of x."""
        return int8.quantize_rows_unsigned(x.reshape(-1, x.shape[-1]), gelu=gelu), x.shape[:-1]

    def quantize_modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[int8.UnsignedRows, torch.Size]:
        """See `QuantizesInput.quantize_modulated`: one pass over memory."""
        if tokens.is_supported(x, scale, shift):
            return int8.norm_modulate_quantize(x, scale, shift), x.shape[:-1]
        quantized: tuple[int8.UnsignedRows, torch.Size] = super().quantize_modulated(x, scale, shift)
        return quantized

    def matmul(self, quantized: tuple[int8.UnsignedRows, torch.Size]) -> Tensor:
        """Multiplies a quantized input with the weight and adds the bias -> (..., O)."""
        rows, leading_shape = quantized
        return int8.prepacked_linear(rows, self.prepacked_weight, self.scale, self.bias).view(*leading_shape, -1)


class WinogradConv3d(ChunkedConv3d):
    """Chunked convolution of stride 1 by four or six 2D kernels; see `kernels.cpu.winograd`.

    The kernels are prepacked at the first call: the best memory order depends on the size of the frames.
    """

    def __init__(self, conv: CausalConv3d, winograd_frames: int) -> None:
        super().__init__()
        self.winograd_frames = winograd_frames
        self.causal, self.stride, self.out_channels = conv.causal, conv.stride, conv.out_channels
        self.kernels = list(winograd.transform_kernel(conv.weight.detach(), winograd_frames))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.is_prepacked = False

    def convolve(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """See `ChunkedConv3d.convolve`. The result is channels last in memory."""
        x = padded.movedim(1, -1).contiguous()
        return winograd.convolve(x, self._prepacked_kernels(x), self.bias if add_bias else None).movedim(-1, 1)

    def convolve_repeated_frame(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """See `ChunkedConv3d.convolve_repeated_frame`: a third of the convolutions."""
        x = padded[:, :, :1].movedim(1, -1).contiguous()
        kernels = self._prepacked_kernels(padded.movedim(1, -1))
        return winograd.convolve_repeated_frame(x, kernels, self.bias if add_bias else None).movedim(-1, 1)

    def _prepacked_kernels(self, x: Tensor) -> Sequence[Tensor]:
        """Returns the kernels, prepacked for x (B, F + 2, H, W, C)."""
        if not self.is_prepacked:
            images = max(1, x.shape[0] * (x.shape[1] - KERNEL_SIZE + 1) // self.winograd_frames)
            for index, kernel in enumerate(self.kernels):  # each plain kernel is freed once it is prepacked
                with mmap_large_allocations():
                    self.kernels[index] = winograd.prepack_kernel(kernel, images, x.shape[2], x.shape[3])
            self.is_prepacked = True
        return self.kernels


def _parents(module: nn.Module) -> list[nn.Module]:
    """Returns the modules that have children. A list of the layers too would keep their plain weights in memory."""
    return [item for item in module.modules() if any(item.children())]


def prepack_linears(module: nn.Module, *, release: ReleaseTensors = release_nothing) -> None:
    """Prepacks the linear layers of a module, one after the other: those in bfloat16, and those in 8-bit integers.

    Args:
        release: called with each weight that was replaced.
    """
    for parent in _parents(module):
        for name, child in list(parent.named_children()):
            check_cancelled()
            if isinstance(child, Linear) and should_prepack_linears(child.weight.dtype, child.weight.device):
                weight = child.weight.detach()
                setattr(parent, name, PrepackedLinear(weight, child.bias).eval())
                release([weight])
            elif isinstance(child, Int8Linear) and has_int8_units() and mode.current() != mode.REFERENCE:
                setattr(parent, name, PrepackedInt8Linear(child).eval())


def prepack_convs(
    module: nn.Module, *, winograd_frames: int = winograd.F43, release: ReleaseTensors = release_nothing
) -> None:
    """Prepacks the convolutions of a VAE's encoder or decoder, one after the other; see `prepack_linears`.

    Args:
        winograd_frames: output frames at a time, `winograd.F23` or `winograd.F43`.
        release: called with each weight that was replaced.
    """
    for parent in _parents(module):
        for name, child in list(parent.named_children()):
            check_cancelled()
            if isinstance(child, CausalConv3d) and set(child.stride) == {1}:
                weight = child.weight.detach()
                prepacked = WinogradConv3d(child, winograd_frames).eval()
                if isinstance(parent, nn.ModuleList):
                    parent[int(name)] = prepacked
                else:
                    setattr(parent, name, prepacked)
                release([weight])
