"""Weights in the order that this CPU's kernels read them: the same numbers, sooner multiplied.

oneDNN puts a weight into blocks before every product. A weight that is multiplied with many times is better put there
once. A packed matrix takes as many bytes as the plain one, and the four kernels of a convolution a third more; see
`kernels.cpu.winograd`. The plain ones are let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from kadr.kernels import int8, mode
from kadr.kernels.cpu import winograd
from kadr.kernels.cpu.malloc import to_stay
from kadr.kernels.matmul import has_bfloat16, linear, linear_gelu
from kadr.nn.conv import KERNEL, StreamedConv, VideoConv
from kadr.nn.linear import EndsInGelu, Linear, Prepares
from kadr.quant.layers import Int8Linear

# Bytes of the packed kernels to those of the weight, by how many frames are made at a time.
CONVOLUTION = {winograd.PAIRS: 4 / 3, winograd.FOURS: 2.0}
Release = Callable[[Iterable[Tensor]], None]


def nothing(tensors: Iterable[Tensor]) -> None:
    """Let go of nothing."""


def packs_matrices(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices in that dtype are worth packing there: bfloat16 on CPUs with units for it."""
    return dtype == torch.bfloat16 and has_bfloat16() and _here(device)


def packs_convolutions(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether convolutions in that dtype are worth packing there."""
    return (dtype == torch.float32 or packs_matrices(dtype, device)) and _here(device)


def _here(device: torch.device) -> bool:
    return device.type == "cpu" and mode.current() != mode.REFERENCE and _has_onednn()


@cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class PackedMatrix(EndsInGelu):
    """y = x Wᵀ + b in bfloat16, with W packed; with or without a GELU before the sums are rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """gelu(x Wᵀ + b), in the tanh form."""
        return linear_gelu(x, self.packed, self.bias)


class PackedInt8Linear(Prepares):
    """`Int8Linear` through oneDNN; see `kernels.int8.packed_linear`."""

    scale: Tensor

    def __init__(self, plain: Int8Linear) -> None:
        super().__init__()
        self.packed = int8.pack(plain.weight)
        self.register_buffer("scale", plain.scale)
        self.register_buffer("bias", plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.finished(self.prepared(x))

    def prepared(self, x: Tensor, *, gelu: bool = False) -> tuple[int8.Rows, torch.Size]:
        """x (..., K), or its GELU, in 8 bits; and the shape of what is around the rows."""
        return int8.rows_of(x.reshape(-1, x.shape[-1]), gelu=gelu), x.shape[:-1]

    def finished(self, prepared: tuple[int8.Rows, torch.Size]) -> Tensor:
        """The product (..., O)."""
        rows, around = prepared
        return int8.packed_linear(rows, self.packed, self.scale, self.bias).view(*around, -1)


class PackedConv(StreamedConv):
    """A streamed convolution of stride 1 by four kernels over single pictures, or by six; see `kernels.cpu.winograd`.

    They are packed when the first pictures come: which order is best depends on their size.
    """

    def __init__(self, plain: VideoConv, together: int) -> None:
        super().__init__()
        self.together = together
        self.causal, self.stride, self.out_channels = plain.causal, plain.stride, plain.out_channels
        self.kernels = list(winograd.taps(plain.weight.detach(), together))
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())
        self.is_packed = False

    def convolve(self, joined: Tensor, *, biased: bool) -> Tensor:
        """See `StreamedConv.convolve`. The result lies channels last."""
        x = joined.movedim(1, -1).contiguous()
        return winograd.convolve(x, self._ready(x), self.bias if biased else None).movedim(-1, 1)

    def convolve_still(self, joined: Tensor, *, biased: bool) -> Tensor:
        """See `StreamedConv.convolve_still`: a third of the products."""
        x = joined[:, :, :1].movedim(1, -1).contiguous()
        kernels = self._ready(joined.movedim(1, -1))
        return winograd.convolve_still(x, kernels, self.bias if biased else None).movedim(-1, 1)

    def _ready(self, x: Tensor) -> Sequence[Tensor]:
        """The kernels, packed for x (B, F + 2, H, W, C)."""
        if not self.is_packed:
            pictures = max(1, x.shape[0] * (x.shape[1] - KERNEL + 1) // self.together)
            for index, kernel in enumerate(self.kernels):  # one by one: the plain one goes when the packed one is there
                with to_stay():
                    self.kernels[index] = winograd.pack(kernel, pictures, x.shape[2], x.shape[3])
            self.is_packed = True
        return self.kernels


def pack_matrices(module: nn.Module, *, release: Release = nothing) -> None:
    """Pack the matrices of a module, one after the other: those in bfloat16, and those in 8 bits.

    Args:
        release: told of each weight that is not needed any more.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and packs_matrices(child.weight.dtype, child.weight.device):
                weight = child.weight.detach()
                setattr(parent, name, PackedMatrix(weight, child.bias).eval())
                release([weight])
            elif isinstance(child, Int8Linear) and int8.packs() and mode.current() != mode.REFERENCE:
                setattr(parent, name, PackedInt8Linear(child).eval())


def pack_convolutions(module: nn.Module, *, together: int = winograd.FOURS, release: Release = nothing) -> None:
    """Pack the convolutions of a VAE's half, one after the other; see `pack_matrices`.

    Args:
        together: frames that are made at a time, `winograd.PAIRS` or `FOURS`.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, VideoConv) and set(child.stride) == {1}:
                weight = child.weight.detach()
                packed = PackedConv(child, together).eval()
                if isinstance(parent, nn.ModuleList):
                    parent[int(name)] = packed
                else:
                    setattr(parent, name, packed)
                release([weight])
