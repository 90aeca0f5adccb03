"""Fixtures for a process in which Triton's interpreter replaces the GPU. Import it before any kernel."""

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
    """Rounds conversions as GPUs do: Triton 3.7's interpreter truncates to bfloat16, and loses carries to fp8."""

    def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, _: Any) -> np.ndarray:
        source_dtype, target_dtype = TORCH[source], TORCH[target]
        converted = (
            torch.from_numpy(values.copy().view(f"i{source_dtype.itemsize}")).view(source_dtype).to(target_dtype)
        )
        return converted.view(BITS[target_dtype]).numpy().view(f"u{target_dtype.itemsize}")

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def enable_all_kernels() -> Iterator[None]:
    """Enables kernels on every device, with no verdicts yet."""
    trial.reset()
    with mode.override(mode.EVERYWHERE):
        yield
