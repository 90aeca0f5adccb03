"""What a process needs in which Triton's interpreter stands in for a GPU. Import it before any kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from kadr.kernels import mode, trial

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}
TORCH = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7 interprets a conversion to bfloat16 by cutting off, and to fp8 without carrying. GPUs round."""

    def convert(numbers: np.ndarray, source: tl.dtype, target: tl.dtype, _: Any) -> np.ndarray:
        there, here = TORCH[source], TORCH[target]
        made = torch.from_numpy(numbers.copy().view(f"i{there.itemsize}")).view(there).to(here)
        return made.view(BITS[here]).numpy().view(f"u{here.itemsize}")

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def enable_all_kernels() -> Iterator[None]:
    """And none tried yet."""
    trial.reset()
    with mode.override(mode.EVERYWHERE):
        yield
