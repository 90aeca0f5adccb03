"""Operations that a GPU does in one pass over memory: by a kernel where it can, by their definition elsewhere.

Each function is that of the same name in `reference` (`dequantize` in `dequant`): its arguments and results are
described there, and so is by how much a kernel may differ. `switch` says who may want which.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kadr.kernels import dequant, reference, trial
from kadr.kernels.cpu import pixel_norm
from kadr.kernels.ggml_types import Packing

WIDEST = 16_384  # numbers of a row that a program holds in registers; the hidden layer of 13B has as many
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = {torch.int8: trial.OLDEST, torch.float8_e4m3fn: (8, 9)}  # capabilities; 8-bit floats came with Ada and Hopper
PACKED = ("Q8_0", "Q6_K", "Q4_K")  # formats of GGML that there are kernels for


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """See `reference.norm_modulate`."""
    if _tokens(x, scale, shift):
        return trial.run("adaln", reference.norm_modulate, x, scale, shift, epsilon)
    return reference.norm_modulate(x, scale, shift, epsilon)


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, kind: torch.dtype, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_modulate_quantize`."""
    if _tokens(x, scale, shift, kind=kind):
        return trial.run("adaln", reference.norm_modulate_quantize, x, scale, shift, kind, epsilon)
    return reference.norm_modulate_quantize(x, scale, shift, kind, epsilon)


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """See `reference.gate_residual`."""
    if _tokens(x, gate, whole=(branch,)):
        return trial.run("adaln", reference.gate_residual, x, gate, branch)
    return reference.gate_residual(x, gate, branch)


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate`."""
    if _tokens(x, gate, scale, shift, whole=(branch,)):
        return trial.run("adaln", reference.gate_residual_norm_modulate, x, gate, branch, scale, shift, epsilon)
    return reference.gate_residual_norm_modulate(x, gate, branch, scale, shift, epsilon)


def gate_residual_norm_modulate_quantize(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    kind: torch.dtype,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate_quantize`."""
    arguments = (x, gate, branch, scale, shift, kind, epsilon)
    if _tokens(x, gate, scale, shift, whole=(branch,), kind=kind):
        return trial.run("adaln", reference.gate_residual_norm_modulate_quantize, *arguments)
    return reference.gate_residual_norm_modulate_quantize(*arguments)


def norm_rope(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, epsilon: float = 1e-5) -> Tensor:
    """See `reference.norm_rope`."""
    if x.shape[-1] % 2 == 0 and _tokens(x, weight[None, None], cosine, sine):
        return trial.run("rope", reference.norm_rope, x, weight, cosine, sine, epsilon)
    return reference.norm_rope(x, weight, cosine, sine, epsilon)


def quantize_rows(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_rows`."""
    if _matrix(x, kind):
        return trial.run("quantization", reference.quantize_rows, x, kind)
    return reference.quantize_rows(x, kind)


def gelu_quantize(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.gelu_quantize`."""
    if _matrix(x, kind):
        return trial.run("quantization", reference.gelu_quantize, x, kind)
    return reference.gelu_quantize(x, kind)


def rescale(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.rescale`."""
    shared = [tensor for tensor in (columns, bias) if tensor is not None]
    fits = sums.dim() == 2 and sums.stride(1) == 1 and rows.is_contiguous() and rows.shape == (len(sums), 1)
    fits = fits and all(tensor.is_contiguous() and tensor.shape == sums.shape[1:] for tensor in shared)
    if fits and sums.numel() and trial.wanted((sums, rows, *shared)):
        return trial.run("quantization", reference.rescale, sums, rows, columns, bias, dtype)
    return reference.rescale(sums, rows, columns, bias, dtype)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """See `reference.pixel_norm_modulate_silu`."""
    bends = [tensor for tensor in (scale, shift) if tensor is not None]
    fits = _positions(x) and len(bends) != 1 and _alike(x, x.movedim(1, -1), *bends)
    fits = fits and all(tensor.shape in ((1, x.shape[1]), x.shape[:2]) for tensor in bends)
    if fits and trial.wanted((x, *bends)):
        return trial.run("vae", reference.pixel_norm_modulate_silu, x, scale, shift, epsilon)
    if pixel_norm.suits(x, scale, shift):
        return pixel_norm.pixel_norm_modulate_silu(x, scale, shift, epsilon)
    return reference.pixel_norm_modulate_silu(x, scale, shift, epsilon)


def bias_residual(x: Tensor, bias: Tensor | None, skip: Tensor) -> Tensor:
    """See `reference.bias_residual`."""
    fits = _positions(x) and _positions(skip) and x.shape == skip.shape and _alike(x, bias, skip.movedim(1, -1))
    fits = fits and (bias is None or bias.shape == x.shape[1:2])
    if fits and trial.wanted((x, bias, skip)):
        return trial.run("vae", reference.bias_residual, x, bias, skip)
    return reference.bias_residual(x, bias, skip)


def dequantize(packed: Tensor, packing: Packing, out: Tensor) -> Tensor:
    """See `dequant.dequantize`."""
    rows, columns = out.shape
    lies = rows and columns and packed.stride(-1) == out.stride(-1) == 1 and out.dtype in DTYPES
    fits = lies and packing.name in PACKED and packed.shape == (rows, packing.row_bytes(columns))
    if fits and trial.wanted((packed, out)):
        return trial.run("ggml", dequant.dequantize, packed, packing, out)
    return dequant.dequantize(packed, packing, out)


def _tokens(x: Tensor, *shared: Tensor | None, whole: tuple[Tensor, ...] = (), kind: torch.dtype = torch.int8) -> bool:
    """Whether there is a kernel for x (B, N, D), and may run.

    Args:
        shared: (B or 1, N or 1, D), or None.
        whole: of x's shape.
        kind: what comes out in 8 bits, if anything.
    """
    if (
        not trial.possible(x)
        or x.dim() != 3
        or not x.numel()
        or x.shape[-1] > WIDEST
        or not _alike(x, x, *shared, *whole)
    ):
        return False
    if any(tensor.shape != x.shape for tensor in whole):
        return False
    given = [tensor for tensor in shared if tensor is not None]
    spread = all(side in (1, own) for tensor in given for side, own in zip(tensor.shape[:-1], x.shape, strict=False))
    fits = spread and all(tensor.dim() == 3 and tensor.shape[-1] == x.shape[-1] for tensor in given)
    return fits and trial.wanted((x, *given, *whole), OLDEST[kind])


def _matrix(x: Tensor, kind: torch.dtype) -> bool:
    """Whether there is a kernel for the rows of x (R, K), and may run."""
    fits = trial.possible(x) and x.dim() == 2 and bool(x.numel()) and x.shape[-1] <= WIDEST and _alike(x, x)
    return fits and trial.wanted((x,), OLDEST[kind])


def _positions(x: Tensor) -> bool:
    """Whether the channels of x (B, C, F, H, W) lie next to each other, and its positions evenly spaced."""
    if not trial.possible(x) or x.dim() != 5 or not x.numel() or x.stride(1) != 1 or x.shape[1] > WIDEST:
        return False
    sides = [(x.shape[axis], x.stride(axis)) for axis in (4, 3, 2) if x.shape[axis] > 1]
    return all(outer == side * inner for (side, inner), (_, outer) in pairwise(sides))


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are of one dtype that kernels read, with neighbours along the last axis of the others."""
    given = [tensor for tensor in others if tensor is not None]
    same = x.dtype in DTYPES and all(tensor.dtype == x.dtype for tensor in given)
    return same and all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in given)
