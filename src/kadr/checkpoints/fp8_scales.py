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

SCALED_FP8_MARKER = "scaled_fp8"
_WEIGHT_SUFFIX = ".weight"
_WEIGHT_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_INPUT_SCALE_SUFFIXES = (".scale_input", ".input_scale")


def find_weight_scales(infos: Mapping[str, TensorInfo], weights: Iterable[str]) -> dict[str, str]:
    """Weight -> the name of its scale, for those that have one."""
    found = {}
    for weight in weights:
        if weight.endswith(_WEIGHT_SUFFIX):
            stem = weight.removesuffix(_WEIGHT_SUFFIX)
            name = next((stem + end for end in _WEIGHT_SCALE_SUFFIXES if stem + end in infos), None)
            if name is not None:
                found[weight] = name
    return found


def scale_tensor_names(infos: Mapping[str, TensorInfo]) -> set[str]:
    """The names of the tensors that are about scales, and no weights."""
    ends = (*_WEIGHT_SCALE_SUFFIXES, *_INPUT_SCALE_SUFFIXES)
    return {name for name in infos if name == SCALED_FP8_MARKER or name.endswith((f".{SCALED_FP8_MARKER}", *ends))}


def apply_weight_scale(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight in plain numbers, multiplied by its scale (one number, or one per row) and rounded once."""
    if scale is None:
        return weight.to(dtype)
    return (weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)
