"""Operators of zentorch, AMD's library for Zen CPUs, where it is installed: attention and products in 8 bits.

They are a choice like any other: tried against their definition before they are used, and only where they are faster.
Only the library of operators is loaded, in a hundredth of a second. `import zentorch` would take two seconds and
change torch's compiler.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kadr.errors import KadrWarning

ENVIRONMENT_VARIABLE = "KADR_ZENTORCH"  # "0" leaves zentorch unused where it is installed
EXTRA = "amd"  # of kadr, that installs it
PACKAGE, LIBRARY_PATTERN = "zentorch", "_C*.so"


@cache
def is_available() -> bool:
    """Returns whether zentorch is installed for this torch and CPU, and not turned off; loads it."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0" or not torch.cpu._is_avx512_supported():
        return False
    spec = importlib.util.find_spec(PACKAGE)
    libraries = [path for folder in (spec and spec.submodule_search_locations) or () for path in _libraries(folder)]
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"{PACKAGE} is installed but not used: {error}. It has to be the release for torch {torch.__version__}: "
            f"pip install 'kadr[{EXTRA}]', or set {ENVIRONMENT_VARIABLE}=0.",
            KadrWarning,
            stacklevel=2,
        )
        return False
    return bool(torch.ops.zentorch.zentorch_is_avx512_supported())


def _libraries(folder: str) -> list[Path]:
    return sorted(Path(folder).glob(LIBRARY_PATTERN))


def would_help() -> bool:
    """Returns whether zentorch is for this CPU and is missing."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and _is_amd() and not is_available()


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False


def is_attention_supported(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `attend` computes these inputs."""
    has_dtype = q.dtype in (torch.bfloat16, torch.float32) and q.dtype == k.dtype == v.dtype
    return has_dtype and q.device.type == "cpu" and is_available()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Computes softmax(q kᵀ + bias) v; see `kernels.attention.attend`."""
    mask = None if bias is None else bias.expand(len(q), q.shape[1], q.shape[2], -1)
    output: Tensor = torch.ops.zentorch.zentorch_sdpa(q, k, v, attn_mask=mask, scale=1.0)[0]
    return output
