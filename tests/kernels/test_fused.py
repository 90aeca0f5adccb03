"""When a kernel stands in for its definition, and when it is not trusted to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr.errors import KadrWarning, RequestError
from kadr.kernels import dequant, fused, mode, reference, trial
from kadr.kernels.ggml_types import GGML_TYPES

SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(mode.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(mode, "_current_mode", None)
    trial.reset()
    yield
    trial.reset()


class Kernels:
    """Stand-ins for kernels: definitions that note that they were called. `spoil` changes what one gives."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.spoil: Callable[[Any], Any] = lambda made: made

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            self.called.append(name)
            return self.spoil(getattr(dequant if name == "dequantize" else reference, name)(*arguments))

        return kernel


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Kernels everywhere, without triton."""
    made = Kernels()
    monkeypatch.setattr(trial, "import_module", lambda name: made)
    with mode.override(mode.EVERYWHERE):
        yield made


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entry(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return drawn(2, 3, 8, dtype=dtype), drawn(2, 1, 8, seed=1, dtype=dtype), drawn(2, 1, 8, seed=2, dtype=dtype)


def test_the_environment_is_read_when_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode.current() == mode.AUTO
    monkeypatch.setattr(mode, "_current_mode", None)
    monkeypatch.setenv(mode.ENVIRONMENT_VARIABLE, "reference")
    assert mode.current() == mode.REFERENCE
    with mode.override(mode.EVERYWHERE):
        assert mode.current() == mode.EVERYWHERE
    assert mode.current() == mode.REFERENCE


def test_a_choice_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mode.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(RequestError, match="KADR_KERNELS is 'fastest'; it must be one of auto, reference, everywhere"):
        mode.current()
    with pytest.raises(RequestError, match="'none'"), mode.override("none"):
        pass


def test_a_choice_ends_with_its_block_even_in_an_error() -> None:
    with pytest.raises(ZeroDivisionError), mode.override(mode.REFERENCE):
        raise ZeroDivisionError
    assert mode.current() == mode.AUTO


def test_importing_the_dispatch_brings_no_triton() -> None:
    script = (
        "import kadr.kernels.fused, kadr.kernels.attention, kadr.kernels.fp8, kadr.kernels.cuda_graphs, sys, torch;"
    )
    script += "assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(SOURCES)})


def test_without_a_gpu_definitions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "import_module", lambda name: pytest.fail("a kernel was asked for"))
    assert torch.equal(fused.norm_modulate(*entry()), reference.norm_modulate(*entry()))
    packed, out = torch.zeros(2, 34, dtype=torch.uint8), torch.ones(2, 32)
    assert fused.dequantize(packed, GGML_TYPES["Q8_0"], out) is out
    assert out.eq(0).all()


def test_a_kernel_that_agrees_is_tried_once_and_then_runs_alone(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        assert torch.equal(fused.norm_modulate(*entry()), reference.norm_modulate(*entry()))
    assert kernels.called == ["norm_modulate"] * 3
    compared: list[Any] = []
    monkeypatch.setattr(trial, "_relative_error", lambda *given: compared.append(given) or 0.0)
    fused.norm_modulate(*entry())
    assert not compared
    fused.norm_modulate(*entry(torch.bfloat16))  # compiled anew for another dtype, and so tried anew
    assert len(compared) == 1


def test_a_kernel_that_differs_is_left_alone(kernels: Kernels) -> None:
    kernels.spoil = lambda made: made * 1.1
    with pytest.warns(KadrWarning, match=r"norm_modulate is not used on cpu: its result is 10\.0 % off"):
        made = fused.norm_modulate(*entry())
    assert torch.equal(made, reference.norm_modulate(*entry()))
    assert torch.equal(fused.norm_modulate(*entry()), made)
    assert kernels.called == ["norm_modulate"]


@pytest.mark.parametrize("spoil", [lambda made: made * torch.nan, lambda made: made[:1], lambda made: made.double()])
def test_no_numbers_and_other_shapes_and_dtypes_differ(kernels: Kernels, spoil: Callable[[Tensor], Tensor]) -> None:
    kernels.spoil = spoil
    with pytest.warns(KadrWarning, match="norm_modulate"):
        assert torch.equal(fused.norm_modulate(*entry()), reference.norm_modulate(*entry()))


def test_a_kernel_that_fails_is_left_alone(kernels: Kernels) -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    kernels.spoil = fails
    with pytest.warns(KadrWarning, match=r"RuntimeError: Failed to find C compiler\. .* KADR_KERNELS=reference"):
        made = fused.gate_residual(entry()[0], None, entry()[0])
    assert torch.equal(made, 2 * entry()[0])


def test_of_a_tuple_every_part_is_compared(kernels: Kernels) -> None:
    x, scale, shift = entry()
    kernels.spoil = lambda made: (made[0], made[1] * 1.2)
    with pytest.warns(KadrWarning, match="norm_modulate_quantize"):
        fused.norm_modulate_quantize(x, scale, shift, torch.int8)


def test_what_is_written_in_place_is_compared_with_what_was_right(kernels: Kernels) -> None:
    packed, out = torch.full((2, 34), 20, dtype=torch.uint8), torch.empty(2, 32)
    right = dequant.dequantize(packed, GGML_TYPES["Q8_0"], torch.empty(2, 32))
    kernels.spoil = lambda made: made.mul_(2)
    with pytest.warns(KadrWarning, match="dequantize"):
        assert fused.dequantize(packed, GGML_TYPES["Q8_0"], out) is out
    assert torch.equal(out, right)


def test_where_memory_runs_out_or_numbers_are_none_nothing_is_decided(kernels: Kernels) -> None:
    def full(_: Any) -> Any:
        raise torch.OutOfMemoryError("too little")

    kernels.spoil = full
    assert torch.equal(fused.norm_modulate(*entry()), reference.norm_modulate(*entry()))
    kernels.spoil = lambda made: made
    x, scale, shift = entry()
    assert fused.norm_modulate(x * torch.nan, scale, shift).isnan().all()
    assert not trial._verdicts
    fused.norm_modulate(x, scale, shift)
    assert len(trial._verdicts) == 1


def test_who_wants_gradients_gets_the_definition(kernels: Kernels) -> None:
    x, scale, shift = entry()
    x.requires_grad_()
    assert fused.norm_modulate(x, scale, shift).requires_grad
    assert not kernels.called
    with torch.no_grad():
        fused.norm_modulate(x, scale, shift)
    assert kernels.called


def test_the_switch_turns_all_kernels_off(kernels: Kernels) -> None:
    with mode.override(mode.REFERENCE):
        fused.norm_modulate(*entry())
    assert not kernels.called


def clip(*shape: int) -> Tensor:
    return drawn(*shape).contiguous(memory_format=torch.channels_last_3d)


X, SHARED = drawn(2, 3, 8), drawn(2, 1, 8)
CLIP = clip(2, 8, 3, 2, 2)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("norm_modulate", (X.double(), SHARED.double(), SHARED.double())),
        ("norm_modulate", (X, SHARED.half(), SHARED)),
        ("norm_modulate", (X, SHARED[0, 0], SHARED[0, 0])),
        ("norm_modulate", (X.transpose(1, 2).contiguous().transpose(1, 2), SHARED, SHARED)),
        ("norm_modulate", (X[:0], SHARED[:0], SHARED[:0])),
        ("norm_modulate", (drawn(1, 1, 16_385),) * 3),
        ("gate_residual", (X, SHARED, SHARED)),
        ("norm_rope", (drawn(1, 2, 8), drawn(8), drawn(2, 8), drawn(2, 8))),
        ("quantize_rows", (X, torch.int8)),
        ("pixel_norm_modulate_silu", (drawn(2, 8, 3, 2, 2),)),
        ("pixel_norm_modulate_silu", (CLIP[..., :1, :],)),
        ("pixel_norm_modulate_silu", (CLIP, drawn(2, 1), drawn(2, 1))),
        ("bias_residual", (CLIP, drawn(1), CLIP)),
        ("rescale", (drawn(2, 8), drawn(1, 1), drawn(8), None, torch.float32)),
        ("rescale", (drawn(2, 8), drawn(2, 1), drawn(1), None, torch.float32)),
        ("rescale", (drawn(8, 2).t(), drawn(2, 1), drawn(8), None, torch.float32)),
        ("bias_residual", (CLIP, drawn(8), drawn(2, 8, 3, 2, 2))),
        ("bias_residual", (CLIP, drawn(8), clip(1, 8, 3, 2, 2))),
        ("dequantize", (torch.zeros(2, 132, dtype=torch.uint8), GGML_TYPES["Q5_0"], torch.empty(2, 192))),
        ("dequantize", (torch.zeros(2, 34, dtype=torch.uint8), GGML_TYPES["Q8_0"], torch.empty(2, 32).double())),
    ],
)
def test_what_no_kernel_is_written_for_is_computed_by_definition(
    kernels: Kernels, name: str, arguments: tuple[Any, ...]
) -> None:
    made = getattr(fused, name)(*arguments)
    right = getattr(dequant if name == "dequantize" else reference, name)(*arguments)
    for one, other in zip(*((it if isinstance(it, tuple) else (it,)) for it in (made, right)), strict=True):
        assert torch.equal(one, other)
    assert not kernels.called


def test_a_kernel_waits_while_a_graph_is_recorded(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(SimpleNamespace):
        __hash__ = object.__hash__

    x = OnGpu(is_cuda=True, device="cuda:0", shape=(2, 3, 8), dim=lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trial.run("adaln", lambda given: "by definition", x) == "by definition"
    assert not kernels.called
    assert not trial._verdicts
