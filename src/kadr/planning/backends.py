"""Names the backend, the kernels that compute a stage on this machine, for the plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kadr.kernels import attention, int8, mode, trial
from kadr.kernels.cpu import zen
from kadr.kernels.matmul import has_bf16_units
from kadr.memory.cpu import cpu_model
from kadr.planning.workload import Workload
from kadr.quant.prepack import should_prepack_convs, should_prepack_linears
from kadr.quant.weight_formats import INT8
from kadr.spec.model import ModelSpec

TORCH = "torch"


def matmul_backend(dtype: torch.dtype, device: torch.device, weight_format: str, *, is_streamed: bool) -> str:
    """Returns the backend of a transformer's or text encoder's matrix products.

    Args:
        weight_format: see `planning.placement.Placement`.
        is_streamed: blocks are streamed, so their weights cannot be prepacked.
    """
    if mode.current() == mode.REFERENCE:
        return _reference_backend()
    if device.type == "cuda":
        return _gpu_backend(device)
    if device.type != "cpu":
        return TORCH
    return _cpu_matmul_backend(dtype, device, weight_format, is_streamed=is_streamed)


def _cpu_matmul_backend(dtype: torch.dtype, device: torch.device, weight_format: str, *, is_streamed: bool) -> str:
    if weight_format == INT8 and int8.has_int8_units():
        return "8-bit units" if is_streamed else f"{_units('VNNI')}, packed weights"
    if not has_bf16_units() or dtype != torch.bfloat16:
        return TORCH
    return (
        f"{_units('AVX512-BF16')}, packed weights"
        if should_prepack_linears(dtype, device) and not is_streamed
        else "oneDNN"
    )


def describe_attention(spec: ModelSpec, workload: Workload, kernels: Mapping[str, str], *, is_8bit: bool) -> str:
    """Names the kernel of self-attention in the largest pass, and what would be faster on this CPU.

    Args:
        kernels: those that were chosen before; see `kernels.choices`.
        is_8bit: the transformer multiplies in 8 bits.
    """
    config, device = spec.transformer_config, spec.device
    tokens = max(resolved_pass.grid.num_tokens for resolved_pass in workload.passes)
    shape = (config.num_heads, tokens, config.head_dim)
    name = attention.find_choice(kernels, shape, spec.dtype, device, may_round=is_8bit)
    text = f"attention over {tokens} tokens: {name or 'the fastest of those installed, tried at its first use'}"
    has_choice = device.type == "cpu" and attention.has_cpu_choice(shape[0] * tokens**2, spec.dtype)
    if has_choice and spec.dtype == torch.bfloat16 and zen.is_recommended(cpu_model()):
        text += f"; zentorch takes about {zen.TIME_SHARE} of the time of oneDNN: pip install 'kadr[{zen.EXTRA}]'"
    return text


def conv_backend(dtype: torch.dtype, device: torch.device) -> str:
    """Returns the backend of a VAE's convolutions."""
    if mode.current() == mode.REFERENCE:
        return _reference_backend()
    if device.type == "cuda":
        return f"{_gpu_backend(device)}, channels last"
    if not should_prepack_convs(dtype, device):
        return TORCH
    return f"Winograd on {_units('AVX512-BF16')}" if dtype == torch.bfloat16 else "Winograd"


def _units(without_amx: str) -> str:
    return "AMX" if torch.cpu._is_amx_tile_supported() else without_amx


def _gpu_backend(device: torch.device) -> str:
    return "fused kernels" if trial.is_supported(device) else TORCH


def _reference_backend() -> str:
    return f"{TORCH}, set by {mode.ENVIRONMENT_VARIABLE}={mode.REFERENCE}"
