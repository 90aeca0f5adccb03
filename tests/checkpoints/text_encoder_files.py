"""Files of a T5 encoder as ComfyUI has them, written from a module by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kadr.checkpoints.keys import T5_KEYS, map_keys
from kadr.models.t5 import T5Encoder

E4M3_MAX = 448
Tensors = dict[str, Tensor]


def encoder_tensors(module: T5Encoder) -> Tensors:
    """Returns an encoder's weights under transformers' keys, in float32."""
    state = module.state_dict()
    return {file_key: state[key].contiguous() for key, file_key in map_keys(T5_KEYS, state).items()}


def in_fp16(tensors: Tensors) -> Tensors:
    return {name: tensor.half() for name, tensor in tensors.items()}


def in_fp8(tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and "block." in name and "relative_attention_bias" not in name


def in_scaled_fp8(tensors: Tensors) -> Tensors:
    """Returns them as in t5xxl_fp8_e4m3fn_scaled.safetensors."""
    stored: Tensors = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if is_block_matrix(name, tensor):
            scale = tensor.abs().max() / E4M3_MAX
            stem = name.removesuffix(".weight")
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{stem}.scale_weight": scale}
            stored[f"{stem}.scale_input"] = torch.ones(())
        else:
            stored[name] = tensor.half()
    return stored


def mark(**config: object) -> Tensor:
    """Returns ComfyUI's mark of a quantized layer."""
    return torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)


def in_mixed_precision(tensors: Tensors, is_quantized: Callable[[str, Tensor], bool] = is_block_matrix) -> Tensors:
    """Returns them with every second matrix in fp8, marked and scaled as ComfyUI's mixed precision."""
    stored = dict(tensors)
    for name in [name for name, tensor in tensors.items() if is_quantized(name, tensor)][::2]:
        scale, stem = tensors[name].float().abs().max() / E4M3_MAX, name.removesuffix(".weight")
        stored[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        stored |= {f"{stem}.weight_scale": scale, f"{stem}.input_scale": torch.ones(())}
        stored[f"{stem}.comfy_quant"] = mark(format="float8_e4m3fn", full_precision_matrix_mult=True)
    return stored


def dequantize(stored: Tensors) -> Tensors:
    """Returns the float32 weights that stored ones stand for."""
    scales = {
        name.rpartition(".")[0] + ".weight": tensor
        for name, tensor in stored.items()
        if name.endswith((".scale_weight", ".weight_scale"))
    }
    return {
        name: tensor.float() * scales.get(name, torch.ones(()))
        for name, tensor in stored.items()
        if name.endswith(("weight", "bias", "table")) and not name.endswith(".scale_weight")
    }


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return path
