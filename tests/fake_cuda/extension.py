"""Builds and loads the emulation of CUDA, and the operations that CUDA computes under rules of its own."""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("emulation.cpp")
INT_MM_MIN_ROWS, INT_MM_ALIGNMENT, SCALED_MM_ALIGNMENT = 17, 8, 16
_LIBRARY = torch.library.Library("aten", "IMPL")


@cache
def missing_requirement() -> str | None:
    """Returns what the emulation needs and does not find; None where it can be built."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "needs a build of torch for CPUs: this one has CUDA's own kernels (see tests/gpu)"
    if any(shutil.which(program) is None for program in ("c++", "ninja")):
        return "needs a C++ compiler and ninja: apt-get install g++ ninja-build"
    return None


@cache
def load_emulation() -> None:
    """Builds the emulation in `build`, unless it is there already, and loads it into this process."""
    from torch.utils import cpp_extension

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(__file__).parents[2] / "build" / "fake_cuda" / key
    folder.mkdir(parents=True, exist_ok=True)
    cpp_extension.load(
        "kadr_fake_cuda",
        [str(SOURCE)],
        extra_cflags=["-O1", "-w"],
        build_directory=str(folder),
        is_python_module=False,
    )
    _LIBRARY.impl("_int_mm", _int_mm, "CUDA")
    _LIBRARY.impl("_scaled_mm", _scaled_mm, "CUDA")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies int8 (R, K) by (K, O), for the shapes that cuBLAS takes."""
    _require(a.dtype == b.dtype == torch.int8, f"_int_mm of {a.dtype} and {b.dtype}")
    _require(a.is_cuda and b.is_cuda, f"_int_mm of tensors on {a.device} and {b.device}")
    _require(len(a) >= INT_MM_MIN_ROWS, f"self.size(0) needs to be greater than 16, but got {len(a)}")
    for side in (a.shape[1], b.shape[1]):
        _require(side % INT_MM_ALIGNMENT == 0, f"a side of _int_mm must be a multiple of 8, but got {side}")
    return torch._int_mm(a.cpu(), b.cpu()).to(a.device)


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Multiplies 8-bit floats (R, K) by (K, O) and scales, for the layouts and scales that cuBLASLt takes."""
    dtype = out_dtype or a.dtype
    tensors = [tensor for tensor in (a, b, scale_a, scale_b, bias) if tensor is not None]
    _require(all(tensor.is_cuda for tensor in tensors), f"_scaled_mm on {[str(tensor.device) for tensor in tensors]}")
    _require(a.stride(1) == 1 and b.stride(0) == 1, "mat1 must be row major and mat2 column major")
    _require(scale_a.dtype == scale_b.dtype == torch.float32, "scales must be float32")
    sides = (a.shape[1], b.shape[1])
    _require(
        not any(side % SCALED_MM_ALIGNMENT for side in sides), f"trailing dimensions {sides} are no multiples of 16"
    )
    is_row_wise = scale_a.numel() > 1 or scale_b.numel() > 1
    if is_row_wise:
        shapes = ((len(a), 1), (1, b.shape[1]))
        _require((scale_a.shape, scale_b.shape) == shapes, f"row-wise scales must have the shapes {shapes}")
        _require(dtype == torch.bfloat16, "only bf16 outputs are supported for row-wise scaling")
    _require(bias is None or bias.dtype == dtype != torch.float32, f"a bias of {bias is not None} for {dtype}")
    sums = F.linear(a.cpu().float(), b.cpu().t().float()) * scale_a.cpu() * scale_b.cpu()
    return (sums if bias is None else sums + bias.cpu().float()).to(dtype).to(a.device)
