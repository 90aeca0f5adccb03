"""Stands in for the Triton kernels on an emulated GPU: each is its definition, and says that it was called."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from kadr.kernels import attention, dequant, fp8, reference, trial

MODULES = ("adaln", "rope", "quantization", "vae", "ggml")


class _Definitions(ModuleType):
    def __init__(self, name: str, calls: Counter[str]) -> None:
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        definition = getattr(dequant if name == "dequantize" else reference, name)

        def kernel(*arguments: Any) -> Any:
            self.calls[name] += 1
            return definition(*arguments)

        return kernel


@contextmanager
def definitions_as_kernels(calls: Counter[str]) -> Iterator[None]:
    """Replaces the kernels, counts their calls, and forgets what was chosen before and during the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            full_name = f"kadr.kernels.triton.{name}"
            patch.setitem(sys.modules, full_name, _Definitions(full_name, calls))
        _forget()
        yield
        _forget()


def _forget() -> None:
    trial.reset()
    fp8.reset()
    trial._capability.cache_clear()
    attention.autotuner_for.cache_clear()
