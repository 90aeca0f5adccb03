"""The trial of a kernel compares a corner of its first output, in the memory of the kernel, and knows AMD's GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from kadr.errors import KadrWarning
from kadr.kernels import dequant, fused, mode, reference, trial
from kadr.kernels.ggml_types import GGML_TYPES
from tests.live_bytes import LiveBytes
from tests.oracles import randn

DEVICE = torch.device("cuda", 0)
OPERATIONS = (
    "norm_modulate",
    "norm_modulate_quantize",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_quantize",
    "norm_rope",
    "quantize_rows",
    "gelu_quantize",
    "rescale",
    "pixel_norm_modulate_silu",
    "bias_residual",
    "dequantize",
)


@pytest.fixture(autouse=True)
def no_verdicts() -> Iterator[None]:
    trial.reset()
    with torch.no_grad(), mode.override(mode.EVERYWHERE):
        yield
    trial.reset()
    trial._capability.cache_clear()


def arguments_of(name: str) -> tuple[Any, ...]:
    """Returns inputs of a few MB, whose corner is a few KB."""
    x, modulation, rows = randn(2, 800, 256), randn(2, 1, 256), randn(1600, 256)
    pixels = randn(2, 64, 3, 40, 40).contiguous(memory_format=torch.channels_last_3d)
    rotation = randn(1, 800, 128, 2)
    packed = torch.full((4000, 272), 20, dtype=torch.uint8)
    return {
        "norm_modulate": (x, modulation, modulation),
        "norm_modulate_quantize": (x, modulation, modulation, torch.int8),
        "gate_residual": (x, modulation, x),
        "gate_residual_norm_modulate": (x, None, x, modulation, modulation),
        "gate_residual_norm_modulate_quantize": (x, modulation, x, modulation, modulation, torch.float8_e4m3fn),
        "norm_rope": (x, randn(256), rotation),
        "quantize_rows": (rows, torch.int8),
        "gelu_quantize": (rows, torch.int8),
        "rescale": (rows, rows[:, :1].contiguous(), rows[0], rows[1], torch.float32),
        "pixel_norm_modulate_silu": (pixels, randn(2, 64), randn(2, 64)),
        "bias_residual": (pixels, randn(64), pixels),
        "dequantize": (packed, GGML_TYPES["Q8_0"], torch.empty(4000, 256)),
    }[name]


def install_kernel(patch: pytest.MonkeyPatch, name: str, kernel: Callable[..., Any]) -> None:
    patch.setattr(trial, "import_module", lambda module: SimpleNamespace(**{name: kernel}))


def definition(name: str) -> Callable[..., Any]:
    return getattr(dequant if name == "dequantize" else reference, name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_trial_takes_no_more_memory_than_its_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(name)
    expected = definition(name)(*arguments)
    install_kernel(monkeypatch, name, lambda *_: tree_map(torch.clone, expected))  # allocates its outputs alone
    with LiveBytes() as live:
        outputs = getattr(fused, name)(*arguments)
    assert list(trial._verdicts.values()) != [None]
    assert len(trial._verdicts) == 1
    assert live.peak_bytes < sum(tensor.nbytes for tensor in tree_leaves(outputs)) + (1 << 19)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_in_the_last_row_of_the_last_sample_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors in offsets show there, at the end of memory."""

    def wrong(*arguments: Any) -> Any:
        outputs = definition(name)(*arguments)
        tensor = outputs if isinstance(outputs, Tensor) else outputs[-1]
        tensor[(-1, 5, -1, -1, -1) if tensor.dim() == 5 else (-1,) * tensor.dim()] = 99.0
        return outputs

    install_kernel(monkeypatch, name, wrong)
    arguments = arguments_of(name)
    with pytest.warns(KadrWarning, match=f"{name} is not used on cpu: its result is .* % off"):
        outputs = getattr(fused, name)(*arguments)
    for actual, correct in zip(tree_leaves(outputs), tree_leaves(definition(name)(*arguments)), strict=True):
        assert torch.equal(actual.float(), correct.float())


@pytest.mark.parametrize("axis", [0, 1])
def test_an_output_of_too_few_rows_is_found(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install_kernel(monkeypatch, "norm_modulate", lambda *inputs: reference.norm_modulate(*inputs).narrow(axis, 1, 1))
    with pytest.warns(KadrWarning, match="norm_modulate is not used"):
        assert fused.norm_modulate(*arguments_of("norm_modulate")).shape == (2, 800, 256)


@pytest.mark.parametrize("number", [(11, 0), (9, 4), (7, 0)], ids=str)
def test_kernels_run_on_amd_gpus_but_for_8_bit_floats(number: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx1100 calls itself (11, 0) and gfx942 (9, 4): on NVIDIA's scale both would have 8-bit floats."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(trial.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: number)
    assert trial.is_supported(DEVICE, fused.MIN_CAPABILITIES[torch.int8])
    assert not trial.is_supported(DEVICE, fused.MIN_CAPABILITIES[torch.float8_e4m3fn])
    monkeypatch.setattr(trial.importlib.util, "find_spec", lambda name: None)
    trial._capability.cache_clear()
    assert not trial.is_supported(DEVICE)
