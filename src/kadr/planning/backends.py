"""Which of the ways to compute a stage this machine takes, in words."""

from __future__ import annotations

import torch

from kadr.kernels import int8, mode, trial
from kadr.kernels.matmul import has_bf16_units
from kadr.quant.prepack import should_prepack_convs, should_prepack_linears
from kadr.quant.weight_formats import INT8

PLAIN = "torch"


def of_matrices(dtype: torch.dtype, device: torch.device, hold: str, *, streamed: bool) -> str:
    """What a transformer's products are computed by.

    Args:
        hold: see `planning.plan.Choice`.
        streamed: blocks come and go, so their weights stay in the order of the file.
    """
    if mode.current() == mode.REFERENCE:
        return _left_out()
    if device.type == "cuda":
        return _fused(device)
    if device.type != "cpu":
        return PLAIN
    if hold == INT8 and int8.has_int8_units():
        return "8-bit units" if streamed else f"{_units('VNNI')}, packed weights"
    if not has_bf16_units() or dtype != torch.bfloat16:
        return PLAIN
    return (
        f"{_units('AVX512-BF16')}, packed weights"
        if should_prepack_linears(dtype, device) and not streamed
        else "oneDNN"
    )


def of_convolutions(dtype: torch.dtype, device: torch.device) -> str:
    """What a VAE's convolutions are computed by."""
    if mode.current() == mode.REFERENCE:
        return _left_out()
    if device.type == "cuda":
        return f"{_fused(device)}, channels last"
    if not should_prepack_convs(dtype, device):
        return PLAIN
    return f"Winograd on {_units('AVX512-BF16')}" if dtype == torch.bfloat16 else "Winograd"


def _units(without_amx: str) -> str:
    return "AMX" if torch.cpu._is_amx_tile_supported() else without_amx


def _fused(device: torch.device) -> str:
    return "fused kernels" if trial.is_supported(device) else PLAIN


def _left_out() -> str:
    return f"{PLAIN}, as {mode.ENVIRONMENT_VARIABLE}={mode.REFERENCE} has it"
