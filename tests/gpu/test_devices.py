"""On a GPU: the same noise, and so the same video up to rounding."""

from __future__ import annotations

import numpy as np
import pytest

from kadr import Engine, Request

pytestmark = pytest.mark.gpu
REQUEST = Request(prompt="a blue square moving left on a gray background", seed=5)


def test_a_seed_gives_the_same_video_on_both_devices() -> None:
    on_cpu = Engine.open("demo", device="cpu", dtype="float32").generate(REQUEST)
    on_gpu = Engine.open("demo", device="cuda", dtype="float32").generate(REQUEST)
    error = (on_cpu.latents - on_gpu.latents).norm() / on_cpu.latents.norm()
    assert error < 1e-3
    assert np.abs(on_cpu.frames.astype(int) - on_gpu.frames.astype(int)).mean() < 1


def test_bfloat16_on_a_gpu_stays_finite_and_close() -> None:
    exact = Engine.open("demo", device="cuda", dtype="float32").generate(REQUEST)
    narrow = Engine.open("demo", device="cuda", dtype="bfloat16").generate(REQUEST)
    assert np.abs(exact.frames.astype(int) - narrow.frames.astype(int)).mean() < 12
