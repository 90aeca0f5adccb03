"""Products of matrices with what comes right after them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import mode


@cache
def has_bf16_units() -> bool:
    """Whether this CPU has units for products in bfloat16, and torch was built with the kernels that use them."""
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(units and torch.backends.mkldnn.is_available())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, by the same kernel whether the weight is packed or not: the same numbers, to the bit.

    Args:
        x: (..., K).
        weight: (O, K), plain or packed.
        bias: (O).
    """
    if uses_onednn(x) and weight.dtype == x.dtype and not _needs_gradient(x, weight):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x Wᵀ + b), in the tanh form.

    In bfloat16 on a CPU the GELU is taken of the sums before they are rounded: one pass over memory less, and one
    rounding. Arguments as for `linear`.
    """
    if uses_onednn(x) and weight.dtype == x.dtype and not _needs_gradient(x, weight):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return made
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def uses_onednn(x: Tensor) -> bool:
    """Whether oneDNN is to multiply x with weights: bfloat16, on a CPU with units for it."""
    here = x.device.type == "cpu" and x.dtype == torch.bfloat16 and has_bf16_units()
    return here and mode.current() != mode.REFERENCE and not torch.compiler.is_compiling()
