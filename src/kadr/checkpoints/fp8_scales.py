"""Weights in 8-bit floats that have a scale beside them, as ComfyUI writes them.

Beside `x.weight` stands `x.scale_weight` (also seen as `x.weight_scale`), one number or one per row, to multiply with.
The scale of the activations (`scale_input`) is for products in 8 bits, which kadr does not do with these; `scaled_fp8`
marks the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kadr.checkpoints.header import TensorInfo

MARKER = "scaled_fp8"
_WEIGHT = ".weight"
_OF_WEIGHT = (".scale_weight", ".weight_scale")
_OF_INPUT = (".scale_input", ".input_scale")


def scales_of(infos: Mapping[str, TensorInfo], weights: Iterable[str]) -> dict[str, str]:
    """Weight -> the name of its scale, for those that have one."""
    found = {}
    for weight in weights:
        if weight.endswith(_WEIGHT):
            stem = weight.removesuffix(_WEIGHT)
            name = next((stem + end for end in _OF_WEIGHT if stem + end in infos), None)
            if name is not None:
                found[weight] = name
    return found


def belonging(infos: Mapping[str, TensorInfo]) -> set[str]:
    """The names of the tensors that are about scales, and no weights."""
    ends = (*_OF_WEIGHT, *_OF_INPUT)
    return {name for name in infos if name == MARKER or name.endswith((f".{MARKER}", *ends))}


def scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight in plain numbers, multiplied by its scale (one number, or one per row) and rounded once."""
    if scale is None:
        return weight.to(dtype)
    return (weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)
