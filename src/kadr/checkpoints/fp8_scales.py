"""Scaled fp8 weights, as ComfyUI writes them.

`x.scale_weight` (some files: `x.weight_scale`), a scalar or one per row, multiplies `x.weight`. The scale of the
activations (`scale_input`) is for fp8 matmuls, which kadr does not run on these files; `scaled_fp8` marks the file,
`x.comfy_quant` a layer (`comfy_quant`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kadr.checkpoints.header import TensorInfo

SCALED_FP8_MARKER = "scaled_fp8"
COMFY_QUANT_SUFFIX = ".comfy_quant"
_WEIGHT_SUFFIX = ".weight"
_WEIGHT_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_INPUT_SCALE_SUFFIXES = (".scale_input", ".input_scale")


def find_weight_scales(infos: Mapping[str, TensorInfo], weights: Iterable[str]) -> dict[str, str]:
    """Returns weight key -> key of its scale, for those that have one."""
    scale_keys = {}
    for weight in weights:
        if weight.endswith(_WEIGHT_SUFFIX):
            stem = weight.removesuffix(_WEIGHT_SUFFIX)
            scale_key = next((stem + suffix for suffix in _WEIGHT_SCALE_SUFFIXES if stem + suffix in infos), None)
            if scale_key is not None:
                scale_keys[weight] = scale_key
    return scale_keys


def scale_tensor_names(infos: Mapping[str, TensorInfo]) -> set[str]:
    """Returns the keys of scales and markers, which are not weights."""
    suffixes = (f".{SCALED_FP8_MARKER}", COMFY_QUANT_SUFFIX, *_WEIGHT_SCALE_SUFFIXES, *_INPUT_SCALE_SUFFIXES)
    return {name for name in infos if name == SCALED_FP8_MARKER or name.endswith(suffixes)}


def apply_weight_scale(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantizes an fp8 weight with its scale (a scalar, or one per row); the product is rounded once."""
    if scale is None:
        return weight.to(dtype)
    return (weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)
