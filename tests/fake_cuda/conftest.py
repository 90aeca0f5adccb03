"""Fixtures of tests on an emulated GPU. They are skipped where the emulation cannot be built."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda.extension import load_emulation, missing_requirement
from tests.fake_cuda.kernels import definitions_as_kernels
from tests.fake_cuda.modes import media as media
from tests.fake_cuda.runtime import Runtime, emulated_cuda


@pytest.fixture
def cuda() -> Iterator[Runtime]:
    """An emulated GPU of 24 GiB with the compute capability of Hopper."""
    if (reason := missing_requirement()) is not None:
        pytest.skip(reason)
    load_emulation()
    with emulated_cuda() as gpu, definitions_as_kernels(gpu.kernel_calls):
        yield gpu
