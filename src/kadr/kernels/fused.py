"""Operations that a GPU does in one pass over memory: by a kernel where one applies, by their definition elsewhere.

Each function has the name of its definition in `reference` (`dequantize` in `dequant`), which describes arguments and
results, and by how much a kernel may differ. `mode` switches kernels off, or on everywhere.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kadr.kernels import dequant, reference, trial
from kadr.kernels.cpu import pixel_norm, tokens
from kadr.kernels.ggml_types import GGMLType

MAX_ROW_ELEMENTS = 16_384  # a Triton program keeps a row in registers; the feed-forward of 13B is this wide
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# CUDA compute capability by dtype of the codes; 8-bit floats came with Ada and Hopper.
MIN_CAPABILITIES = {torch.int8: trial.TRITON_MIN_CAPABILITY, torch.float8_e4m3fn: (8, 9)}
GGML_KERNEL_TYPES = ("Q8_0", "Q6_K", "Q4_K")  # GGML types that have a kernel


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6) -> Tensor:
    """See `reference.norm_modulate`."""
    if _can_fuse_tokens(x, scale, shift):
        return trial.run("adaln", reference.norm_modulate, x, scale, shift, epsilon)
    if tokens.is_supported(x, scale, shift):
        return tokens.norm_modulate(x, scale, shift, epsilon)
    return reference.norm_modulate(x, scale, shift, epsilon)


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, code_dtype: torch.dtype, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_modulate_quantize`."""
    if _can_fuse_tokens(x, scale, shift, code_dtype=code_dtype):
        return trial.run("adaln", reference.norm_modulate_quantize, x, scale, shift, code_dtype, epsilon)
    return reference.norm_modulate_quantize(x, scale, shift, code_dtype, epsilon)


def gate_residual(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """See `reference.gate_residual`."""
    if _can_fuse_tokens(x, gate, same_shape=(branch,)):
        return trial.run("adaln", reference.gate_residual, x, gate, branch)
    return reference.gate_residual(x, gate, branch)


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor | None, branch: Tensor, scale: Tensor, shift: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate`."""
    if _can_fuse_tokens(x, gate, scale, shift, same_shape=(branch,)):
        return trial.run("adaln", reference.gate_residual_norm_modulate, x, gate, branch, scale, shift, epsilon)
    x = reference.gate_residual(x, gate, branch)
    return x, norm_modulate(x, scale, shift, epsilon)


def gate_residual_norm_modulate_quantize(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor,
    scale: Tensor,
    shift: Tensor,
    code_dtype: torch.dtype,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gate_residual_norm_modulate_quantize`."""
    arguments = (x, gate, branch, scale, shift, code_dtype, epsilon)
    if _can_fuse_tokens(x, gate, scale, shift, same_shape=(branch,), code_dtype=code_dtype):
        return trial.run("adaln", reference.gate_residual_norm_modulate_quantize, *arguments)
    return reference.gate_residual_norm_modulate_quantize(*arguments)


def norm_rope(x: Tensor, weight: Tensor, rotation: Tensor | None, epsilon: float = 1e-5, factor: float = 1.0) -> Tensor:
    """See `reference.norm_rope`."""
    arguments = (x, weight, rotation, epsilon, factor)
    if x.shape[-1] % 2 == 0 and _can_fuse_tokens(x, weight[None, None]) and _is_rotation(rotation, x):
        return trial.run("rope", reference.norm_rope, *arguments)
    if tokens.is_supported(x, weight):
        return tokens.norm_rope(*arguments)
    return reference.norm_rope(*arguments)


def quantize_rows(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_rows`."""
    if _can_fuse_rows(x, code_dtype):
        return trial.run("quantization", reference.quantize_rows, x, code_dtype)
    return reference.quantize_rows(x, code_dtype)


def gelu_quantize(x: Tensor, code_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `reference.gelu_quantize`."""
    if _can_fuse_rows(x, code_dtype):
        return trial.run("quantization", reference.gelu_quantize, x, code_dtype)
    return reference.gelu_quantize(x, code_dtype)


def rescale(sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.rescale`."""
    shared = [tensor for tensor in (column_scales, bias) if tensor is not None]
    is_supported = sums.dim() == 2 and sums.stride(1) == 1
    is_supported = is_supported and row_scales.is_contiguous() and row_scales.shape == (len(sums), 1)
    is_supported = is_supported and all(tensor.is_contiguous() and tensor.shape == sums.shape[1:] for tensor in shared)
    if is_supported and sums.numel() and trial.should_use_kernel((sums, row_scales, *shared)):
        return trial.run("quantization", reference.rescale, sums, row_scales, column_scales, bias, dtype)
    return reference.rescale(sums, row_scales, column_scales, bias, dtype)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """See `reference.pixel_norm_modulate_silu`."""
    modulation = [tensor for tensor in (scale, shift) if tensor is not None]
    is_supported = _has_contiguous_channels(x) and len(modulation) != 1
    is_supported = is_supported and _share_dtype_and_layout(x, x.movedim(1, -1), *modulation)
    is_supported = is_supported and all(tensor.shape in ((1, x.shape[1]), x.shape[:2]) for tensor in modulation)
    if is_supported and trial.should_use_kernel((x, *modulation)):
        return trial.run("vae", reference.pixel_norm_modulate_silu, x, scale, shift, epsilon)
    if pixel_norm.is_supported(x, scale, shift):
        return pixel_norm.pixel_norm_modulate_silu(x, scale, shift, epsilon)
    return reference.pixel_norm_modulate_silu(x, scale, shift, epsilon)


def bias_residual(x: Tensor, bias: Tensor | None, skip: Tensor) -> Tensor:
    """See `reference.bias_residual`."""
    is_supported = (
        _has_contiguous_channels(x)
        and _has_contiguous_channels(skip)
        and x.shape == skip.shape
        and _share_dtype_and_layout(x, bias, skip.movedim(1, -1))
    )
    is_supported = is_supported and (bias is None or bias.shape == x.shape[1:2])
    if is_supported and trial.should_use_kernel((x, bias, skip)):
        return trial.run("vae", reference.bias_residual, x, bias, skip)
    return reference.bias_residual(x, bias, skip)


def dequantize(quantized_weight: Tensor, ggml_type: GGMLType, out: Tensor) -> Tensor:
    """See `dequant.dequantize`."""
    rows, columns = out.shape
    has_layout = rows and columns and quantized_weight.stride(-1) == out.stride(-1) == 1 and out.dtype in KERNEL_DTYPES
    is_supported = (
        has_layout
        and ggml_type.name in GGML_KERNEL_TYPES
        and quantized_weight.shape == (rows, ggml_type.row_bytes(columns))
    )
    if is_supported and trial.should_use_kernel((quantized_weight, out)):
        return trial.run("ggml", dequant.dequantize, quantized_weight, ggml_type, out)
    return dequant.dequantize(quantized_weight, ggml_type, out)


def _can_fuse_tokens(
    x: Tensor, *broadcast: Tensor | None, same_shape: tuple[Tensor, ...] = (), code_dtype: torch.dtype = torch.int8
) -> bool:
    """Returns whether a kernel supports x (B, N, D) and the others, and may run.

    Args:
        broadcast: (B or 1, N or 1, D), or None.
        same_shape: tensors that must have x's shape.
        code_dtype: dtype of the output in 8 bits, if any.
    """
    if (
        not trial.may_use_kernel(x)
        or x.dim() != 3
        or not x.numel()
        or x.shape[-1] > MAX_ROW_ELEMENTS
        or not _share_dtype_and_layout(x, x, *broadcast, *same_shape)
    ):
        return False
    if any(tensor.shape != x.shape for tensor in same_shape):
        return False
    present = [tensor for tensor in broadcast if tensor is not None]
    is_broadcastable = all(
        side in (1, x_side) for tensor in present for side, x_side in zip(tensor.shape[:-1], x.shape, strict=False)
    )
    is_supported = is_broadcastable and all(tensor.dim() == 3 and tensor.shape[-1] == x.shape[-1] for tensor in present)
    return is_supported and trial.should_use_kernel((x, *present, *same_shape), MIN_CAPABILITIES[code_dtype])


def _is_rotation(rotation: Tensor | None, x: Tensor) -> bool:
    """Returns whether a kernel supports the angles of the pairs of x (B, N, D): none, or a table of their layout."""
    if rotation is None:
        return True
    has_shape = rotation.shape[0] in (1, len(x)) and rotation.shape[1:] == (x.shape[1], x.shape[2] // 2, 2)
    return has_shape and rotation.dtype == torch.float32 and rotation.is_contiguous() and rotation.device == x.device


def _can_fuse_rows(x: Tensor, code_dtype: torch.dtype) -> bool:
    """Returns whether a kernel supports the rows of x (R, K), and may run."""
    is_supported = (
        trial.may_use_kernel(x)
        and x.dim() == 2
        and bool(x.numel())
        and x.shape[-1] <= MAX_ROW_ELEMENTS
        and _share_dtype_and_layout(x, x)
    )
    return is_supported and trial.should_use_kernel((x,), MIN_CAPABILITIES[code_dtype])


def _has_contiguous_channels(x: Tensor) -> bool:
    """Returns whether the channels of x (B, C, F, H, W) are contiguous and its positions evenly spaced."""
    if (
        not trial.may_use_kernel(x)
        or x.dim() != 5
        or not x.numel()
        or x.stride(1) != 1
        or x.shape[1] > MAX_ROW_ELEMENTS
    ):
        return False
    sides = [(x.shape[axis], x.stride(axis)) for axis in (4, 3, 2) if x.shape[axis] > 1]
    return all(outer == side * inner for (side, inner), (_, outer) in pairwise(sides))


def _share_dtype_and_layout(x: Tensor, *others: Tensor | None) -> bool:
    """Returns whether all have one dtype that kernels support, and the others a contiguous last axis."""
    present = [tensor for tensor in others if tensor is not None]
    same_dtype = x.dtype in KERNEL_DTYPES and all(tensor.dtype == x.dtype for tensor in present)
    return same_dtype and all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in present)
