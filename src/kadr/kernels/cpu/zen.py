"""Attention by zentorch, AMD's library for Zen CPUs, where it is installed.

It is a choice like any other: tried against the definition before it is used, and only where it is faster. Only the
library of operators is loaded, in a hundredth of a second. `import zentorch` would take two seconds and change torch's
compiler.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels.mode import ZENTORCH_VARIABLE

EXTRA = "amd"  # of kadr, that installs it
TIME_SHARE = 0.7  # of attention by oneDNN; measured on Zen 5, 0.65 to 0.76 by length and width of heads
PACKAGE, LIBRARY_PATTERN = "zentorch", "_C*.so"


@cache
def is_available() -> bool:
    """Returns whether zentorch is installed for this torch and CPU, and not turned off; loads it."""
    if os.environ.get(ZENTORCH_VARIABLE) == "0" or not torch.cpu._is_avx512_supported():
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
            f"pip install 'kadr[{EXTRA}]', or set {ZENTORCH_VARIABLE}=0.",
            KadrWarning,
            stacklevel=2,
        )
        return False
    return bool(torch.ops.zentorch.zentorch_is_avx512_supported())


def version() -> str | None:
    """Returns the version of zentorch; None where it is not used."""
    return importlib.metadata.version(PACKAGE) if is_available() else None


def _libraries(folder: str) -> list[Path]:
    return sorted(Path(folder).glob(LIBRARY_PATTERN))


def is_recommended(cpu: str | None) -> bool:
    """Returns whether zentorch is for the CPU of that name, and is not used."""
    return "AMD" in (cpu or "") and bool(torch.cpu._is_avx512_bf16_supported()) and not is_available()


def is_attention_supported(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `attend` computes these inputs."""
    has_dtype = q.dtype in (torch.bfloat16, torch.float32) and q.dtype == k.dtype == v.dtype
    return has_dtype and q.device.type == "cpu" and is_available()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Computes softmax(q kᵀ + bias) v; see `kernels.attention.attend`."""
    mask = None if bias is None else bias.expand(len(q), q.shape[1], q.shape[2], -1)
    output: Tensor = torch.ops.zentorch.zentorch_sdpa(q, k, v, attn_mask=mask, scale=1.0)[0]
    return output
