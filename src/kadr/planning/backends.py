"""Names the backend, the kernels that compute a stage on this machine, for the plan."""

from __future__ import annotations

import torch

from kadr.kernels import int8, mode, trial
from kadr.kernels.matmul import has_bf16_units
from kadr.quant.prepack import should_prepack_convs, should_prepack_linears
from kadr.quant.weight_formats import INT8

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
