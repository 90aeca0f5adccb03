"""Linear layers fused with a bias and a GELU, by oneDNN in bfloat16 on CPUs.

In float32 on a CPU the result does not depend on where a weight lies in memory; see `_linear_of_one_row`.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import mode

ALIGNMENT = 64  # bytes; torch allocates at multiples of it
_COPIED_BYTES = 2 << 20  # of a weight at a time: they stay in the CPU's cache
_COPIED_ROWS = 64  # a copied part has a multiple of these rows, so that it is split among vector lanes as the whole is


@cache
def has_bf16_units() -> bool:
    """Returns whether this CPU has units for bfloat16 and torch was built with oneDNN, which uses them."""
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(has_units and torch.backends.mkldnn.is_available())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x Wᵀ + b, by the same kernel whether the weight is prepacked or not: results are equal to the bit.

    Args:
        x: (..., K).
        weight: (O, K), plain or prepacked.
        bias: (O).
    """
    if uses_onednn(x) and weight.dtype == x.dtype and not _needs_gradient(x, weight):
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return output
    return _linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes gelu(x Wᵀ + b), in the tanh form.

    In bfloat16 on a CPU, GELU is applied to the sums before they are rounded: one pass over memory and one rounding
    less. Arguments as for `linear`.
    """
    if uses_onednn(x) and weight.dtype == x.dtype and not _needs_gradient(x, weight):
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return output
    return F.gelu(_linear(x, weight, bias), approximate="tanh")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[:-1].numel() != 1:
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or weight.data_ptr() % ALIGNMENT == 0:
        return F.linear(x, weight, bias)
    return _linear_of_one_row(x, weight, bias)


def _linear_of_one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x Wᵀ + b for a single row, as if W lay at a multiple of `ALIGNMENT`, by copying parts of it.

    MKL multiplies a matrix with one row by vectors that begin at a multiple of 16 bytes, so the order of its sums
    depends on the matrix's address. A weight that lies in a mapped file has the address that the length of the file's
    header gives it. Products of two rows and more do not depend on it.
    """
    rows = max(1, _COPIED_BYTES // (weight.shape[1] * weight.element_size()) // _COPIED_ROWS) * _COPIED_ROWS
    if _needs_gradient(x, weight):  # autograd keeps the parts, so they cannot share a buffer
        parts = [F.linear(x, part.clone()) for part in weight.split(rows)]
    else:
        buffer = torch.empty_like(weight[:rows])
        parts = [F.linear(x, buffer[: len(part)].copy_(part)) for part in weight.split(rows)]
    output = torch.cat(parts, dim=-1)
    return output if bias is None else output + bias


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def uses_onednn(x: Tensor) -> bool:
    """Returns whether oneDNN multiplies x with weights: in bfloat16, on a CPU with units for it."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    return has_bf16_units() and mode.current() != mode.REFERENCE
