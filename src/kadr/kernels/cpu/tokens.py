"""Norms, modulation and RoPE of tokens in bfloat16 on CPUs, some rows at a time in float32, which stay in cache.

torch's operations over all tokens are as many passes over memory, and convert between the dtypes in passes of their
own. Here every result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kadr.kernels import mode

SLICE_ELEMENTS = 524_288  # worked on at a time; measured


def is_supported(*tensors: Tensor | None) -> bool:
    """Returns whether these functions can replace their definitions for tokens in bfloat16 and others."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or mode.current() == mode.REFERENCE:
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 for tensor in present)


class Rows(NamedTuple):
    """Some rows of one sample: where they lie, and a buffer for their values in float32."""

    sample: int
    part: slice
    values: Tensor


def rows_in_float32(x: Tensor) -> Iterator[Rows]:
    """Yields the rows of x (B, N, D), converted to float32, slice by slice in one buffer."""
    samples, count, width = x.shape
    buffer = slice_buffer(count, width)
    step = max(1, len(buffer))
    for sample in range(samples):
        for start in range(0, count, step):
            part = slice(start, min(count, start + step))
            yield Rows(sample, part, buffer[: part.stop - start].copy_(x[sample, part]))


def slice_buffer(rows: int, width: int) -> Tensor:
    """Returns an uninitialised tensor, fp32, for as many rows of that width as are worked on at a time."""
    return torch.empty(min(rows, max(1, SLICE_ELEMENTS // width)), width)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """See `reference.norm_modulate`."""
    output, modulation = torch.empty_like(x, memory_format=torch.contiguous_format), Modulation(scale, shift)
    for rows in rows_in_float32(x):
        output[rows.sample, rows.part] = modulation.apply(rows, epsilon)
    return output


def norm_rope(x: Tensor, weight: Tensor, rotation: Tensor | None, epsilon: float = 1e-5, factor: float = 1.0) -> Tensor:
    """See `reference.norm_rope`."""
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight = weight.float() * factor
    angles = None if rotation is None else torch.view_as_complex(rotation)
    for sample, part, values in rows_in_float32(x):
        normalise(values, epsilon).mul_(weight)
        if angles is not None:
            pairs = torch.view_as_complex(values.unflatten(-1, (-1, 2)))
            pairs.mul_(angles[sample % len(angles), part])
        output[sample, part] = values
    return output


class Modulation:
    """Scale and shift of tokens, each (B or 1, N or 1, D), in float32 where all tokens of a sample share them."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self._is_shared = scale.shape[1] == shift.shape[1] == 1
        self.scale, self.shift = (1 + scale.float(), shift.float()) if self._is_shared else (scale, shift)
        self._buffer = scale.new_empty(0, dtype=torch.float32)

    def apply(self, rows: Rows, epsilon: float) -> Tensor:
        """Normalises and modulates rows in place and returns their values."""
        values = normalise(rows.values, epsilon)
        scale, shift = (tensor[rows.sample % len(tensor)] for tensor in (self.scale, self.shift))
        if self._is_shared:
            return torch.addcmul(shift, values, scale, out=values)
        if not len(self._buffer):
            self._buffer = torch.empty_like(values)
        scale, shift = (tensor if len(tensor) == 1 else tensor[rows.part] for tensor in (scale, shift))
        buffer = self._buffer[: len(values)]
        values.mul_(buffer.copy_(scale).add_(1))
        return values.add_(buffer.copy_(shift))


def normalise(values: Tensor, epsilon: float) -> Tensor:
    """Divides values, fp32 (R, D), by the root mean square of each row, in place."""
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values.mul_(norm.square_().div_(values.shape[-1]).add_(epsilon).rsqrt_())
