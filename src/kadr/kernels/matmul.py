"""Linear layers fused with a bias and a GELU, by oneDNN in bfloat16 on CPUs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import mode


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
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes gelu(x Wᵀ + b), in the tanh form.

    In bfloat16 on a CPU, GELU is applied to the sums before they are rounded: one pass over memory and one rounding
    less. Arguments as for `linear`.
    """
    if uses_onednn(x) and weight.dtype == x.dtype and not _needs_gradient(x, weight):
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return output
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def uses_onednn(x: Tensor) -> bool:
    """Returns whether oneDNN multiplies x with weights: in bfloat16, on a CPU with units for it."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    return has_bf16_units() and mode.current() != mode.REFERENCE
