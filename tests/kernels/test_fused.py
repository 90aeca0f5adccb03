"""Dispatch between kernels and their definitions, and the trial that a kernel must pass."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr.errors import Cancelled, KadrWarning, RequestError
from kadr.kernels import attention, dequant, fused, matmul, mode, reference, trial
from kadr.kernels.ggml_types import GGML_TYPES

SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def no_mode_and_no_verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(mode.ENVIRONMENT_VARIABLE, raising=False)
    mode._environment_mode.cache_clear()
    trial.reset()
    yield
    mode._environment_mode.cache_clear()
    trial.reset()


class Kernels:
    """Fake kernels: definitions that record their calls. `spoil` changes their output."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.spoil: Callable[[Any], Any] = lambda output: output

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            self.calls.append(name)
            return self.spoil(getattr(dequant if name == "dequantize" else reference, name)(*arguments))

        return kernel


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Enables fake kernels on every device, without triton."""
    output = Kernels()
    monkeypatch.setattr(trial, "import_module", lambda name: output)
    with mode.override(mode.EVERYWHERE):
        yield output


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def branch_input(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 3, 8, dtype=dtype), randn(2, 1, 8, seed=1, dtype=dtype), randn(2, 1, 8, seed=2, dtype=dtype)


def test_the_environment_variable_is_read_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode.current() == mode.AUTO
    mode._environment_mode.cache_clear()
    monkeypatch.setenv(mode.ENVIRONMENT_VARIABLE, "reference")
    assert mode.current() == mode.REFERENCE
    with mode.override(mode.EVERYWHERE):
        assert mode.current() == mode.EVERYWHERE
    assert mode.current() == mode.REFERENCE


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mode.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(RequestError, match="KADR_KERNELS is 'fastest'; it must be one of auto, reference, everywhere"):
        mode.current()
    with pytest.raises(RequestError, match="'none'"), mode.override("none"):
        pass


def test_an_override_ends_with_its_block_even_in_an_error() -> None:
    with pytest.raises(ZeroDivisionError), mode.override(mode.REFERENCE):
        raise ZeroDivisionError
    assert mode.current() == mode.AUTO


def test_threads_run_in_different_modes_at_once() -> None:
    barrier = threading.Barrier(3)

    def observe(name: str | None) -> list[str]:
        with mode.override(name) if name else nullcontext():
            barrier.wait()  # all are in their blocks
            modes = [mode.current()]
            barrier.wait()  # until all have looked
        return [*modes, mode.current()]

    with mode.override(mode.EVERYWHERE), ThreadPoolExecutor(2) as threads:
        others = [threads.submit(observe, name) for name in (mode.REFERENCE, None)]
        assert observe(None) == [mode.EVERYWHERE] * 2
        assert [other.result() for other in others] == [[mode.REFERENCE, mode.AUTO], [mode.AUTO] * 2]


def test_the_compiler_traces_dispatch_without_a_graph_break() -> None:
    def compute(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = matmul.linear_gelu(fused.norm_modulate(x, scale, shift), torch.eye(8), None)
        h = attention.attend(h[None], h[None], h[None])
        return fused.pixel_norm_modulate_silu(h[..., None])

    with torch.no_grad():
        compiled = torch.compile(compute, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*branch_input()), compute(*branch_input()))


def test_importing_fused_does_not_import_triton() -> None:
    script = (
        "import kadr.kernels.fused, kadr.kernels.attention, kadr.kernels.fp8, kadr.kernels.cuda.graphs, sys, torch;"
    )
    script += "assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(SOURCES)})


def test_without_a_gpu_definitions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "import_module", lambda name: pytest.fail("a kernel was imported"))
    assert torch.equal(fused.norm_modulate(*branch_input()), reference.norm_modulate(*branch_input()))
    quantized, out = torch.zeros(2, 34, dtype=torch.uint8), torch.ones(2, 32)
    assert fused.dequantize(quantized, GGML_TYPES["Q8_0"], out) is out
    assert out.eq(0).all()


def test_a_correct_kernel_is_compared_once_then_runs_alone(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        assert torch.equal(fused.norm_modulate(*branch_input()), reference.norm_modulate(*branch_input()))
    assert kernels.calls == ["norm_modulate"] * 3
    comparisons: list[Any] = []
    monkeypatch.setattr(trial, "_relative_error", lambda *arguments: comparisons.append(arguments) or 0.0)
    fused.norm_modulate(*branch_input())
    assert not comparisons
    fused.norm_modulate(*branch_input(torch.bfloat16))  # compiled again for another dtype, so compared again
    assert len(comparisons) == 1


def test_a_kernel_that_differs_warns_and_is_not_used(kernels: Kernels) -> None:
    kernels.spoil = lambda output: output * 1.1
    with pytest.warns(KadrWarning, match=r"norm_modulate is not used on cpu: its result is 10\.0 % off"):
        output = fused.norm_modulate(*branch_input())
    assert torch.equal(output, reference.norm_modulate(*branch_input()))
    assert torch.equal(fused.norm_modulate(*branch_input()), output)
    assert kernels.calls == ["norm_modulate"]


@pytest.mark.parametrize(
    "spoil", [lambda output: output * torch.nan, lambda output: output[:1], lambda output: output.double()]
)
def test_nan_and_other_shapes_and_dtypes_count_as_different(
    kernels: Kernels, spoil: Callable[[Tensor], Tensor]
) -> None:
    kernels.spoil = spoil
    with pytest.warns(KadrWarning, match="norm_modulate"):
        assert torch.equal(fused.norm_modulate(*branch_input()), reference.norm_modulate(*branch_input()))


def test_a_kernel_that_fails_warns_and_is_not_used(kernels: Kernels) -> None:
    def no_compiler(_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    kernels.spoil = no_compiler
    with pytest.warns(KadrWarning, match=r"RuntimeError: Failed to find C compiler\. .* KADR_KERNELS=reference"):
        output = fused.gate_residual(branch_input()[0], None, branch_input()[0])
    assert torch.equal(output, 2 * branch_input()[0])


def test_every_tensor_of_a_tuple_is_compared(kernels: Kernels) -> None:
    x, scale, shift = branch_input()
    kernels.spoil = lambda output: (output[0], output[1] * 1.2)
    with pytest.warns(KadrWarning, match="norm_modulate_quantize"):
        fused.norm_modulate_quantize(x, scale, shift, torch.int8)


def test_an_out_argument_is_compared_with_the_definitions_values(kernels: Kernels) -> None:
    quantized, out = torch.full((2, 34), 20, dtype=torch.uint8), torch.empty(2, 32)
    expected = dequant.dequantize(quantized, GGML_TYPES["Q8_0"], torch.empty(2, 32))
    kernels.spoil = lambda output: output.mul_(2)
    with pytest.warns(KadrWarning, match="dequantize"):
        assert fused.dequantize(quantized, GGML_TYPES["Q8_0"], out) is out
    assert torch.equal(out, expected)


def test_out_of_memory_and_nan_inputs_give_no_verdict(kernels: Kernels) -> None:
    def out_of_memory(_: Any) -> Any:
        raise torch.OutOfMemoryError("too little")

    kernels.spoil = out_of_memory
    assert torch.equal(fused.norm_modulate(*branch_input()), reference.norm_modulate(*branch_input()))
    kernels.spoil = lambda output: output
    x, scale, shift = branch_input()
    assert fused.norm_modulate(x * torch.nan, scale, shift).isnan().all()
    assert not trial._verdicts
    fused.norm_modulate(x, scale, shift)
    assert len(trial._verdicts) == 1


def test_without_a_verdict_the_output_tensor_has_the_definition(kernels: Kernels) -> None:
    quantized, out = torch.ones(2, 34, dtype=torch.uint8), torch.zeros(2, 32)

    def wrong_then_out_of_memory(output: Tensor) -> Any:
        output.fill_(7.0)
        raise torch.OutOfMemoryError("too little")

    kernels.spoil = wrong_then_out_of_memory
    fused.dequantize(quantized, GGML_TYPES["Q8_0"], out)
    assert torch.equal(out, dequant.dequantize(quantized, GGML_TYPES["Q8_0"], torch.zeros(2, 32)))
    assert not trial._verdicts


@pytest.mark.parametrize(
    "error",
    [Cancelled("stop"), RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), SystemExit()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_says_nothing_about_a_kernel_is_raised(kernels: Kernels, error: BaseException) -> None:
    def fail(_: Any) -> Any:
        raise error

    kernels.spoil = fail
    with pytest.raises(type(error)):
        fused.norm_modulate(*branch_input())
    assert not trial._verdicts


def test_inputs_with_gradients_run_the_definition(kernels: Kernels) -> None:
    x, scale, shift = branch_input()
    x.requires_grad_()
    assert fused.norm_modulate(x, scale, shift).requires_grad
    assert not kernels.calls
    with torch.no_grad():
        fused.norm_modulate(x, scale, shift)
    assert kernels.calls


def test_reference_mode_turns_all_kernels_off(kernels: Kernels) -> None:
    with mode.override(mode.REFERENCE):
        fused.norm_modulate(*branch_input())
    assert not kernels.calls


def video(*shape: int) -> Tensor:
    return randn(*shape).contiguous(memory_format=torch.channels_last_3d)


TOKENS, MODULATION = randn(2, 3, 8), randn(2, 1, 8)
VIDEO = video(2, 8, 3, 2, 2)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("norm_modulate", (TOKENS.double(), MODULATION.double(), MODULATION.double())),
        ("norm_modulate", (TOKENS, MODULATION.half(), MODULATION)),
        ("norm_modulate", (TOKENS, MODULATION[0, 0], MODULATION[0, 0])),
        ("norm_modulate", (TOKENS.transpose(1, 2).contiguous().transpose(1, 2), MODULATION, MODULATION)),
        ("norm_modulate", (TOKENS[:0], MODULATION[:0], MODULATION[:0])),
        ("norm_modulate", (randn(1, 1, 16_385),) * 3),
        ("gate_residual", (TOKENS, MODULATION, MODULATION)),
        ("norm_rope", (randn(1, 2, 8), randn(8), randn(1, 4, 2, 2).transpose(1, 2))),
        ("quantize_rows", (TOKENS, torch.int8)),
        ("pixel_norm_modulate_silu", (randn(2, 8, 3, 2, 2),)),
        ("pixel_norm_modulate_silu", (VIDEO[..., :1, :],)),
        ("pixel_norm_modulate_silu", (VIDEO, randn(2, 1), randn(2, 1))),
        ("bias_residual", (VIDEO, randn(1), VIDEO)),
        ("rescale", (randn(2, 8), randn(1, 1), randn(8), None, torch.float32)),
        ("rescale", (randn(2, 8), randn(2, 1), randn(1), None, torch.float32)),
        ("rescale", (randn(8, 2).t(), randn(2, 1), randn(8), None, torch.float32)),
        ("bias_residual", (VIDEO, randn(8), randn(2, 8, 3, 2, 2))),
        ("bias_residual", (VIDEO, randn(8), video(1, 8, 3, 2, 2))),
        ("dequantize", (torch.zeros(2, 132, dtype=torch.uint8), GGML_TYPES["Q5_0"], torch.empty(2, 192))),
        ("dequantize", (torch.zeros(2, 34, dtype=torch.uint8), GGML_TYPES["Q8_0"], torch.empty(2, 32).double())),
    ],
)
def test_inputs_that_no_kernel_supports_run_the_definition(
    kernels: Kernels, name: str, arguments: tuple[Any, ...]
) -> None:
    output = getattr(fused, name)(*arguments)
    expected = getattr(dequant if name == "dequantize" else reference, name)(*arguments)
    for actual, correct in zip(
        *((outputs if isinstance(outputs, tuple) else (outputs,)) for outputs in (output, expected)), strict=True
    ):
        assert torch.equal(actual, correct)
    assert not kernels.calls


def test_a_kernel_is_not_tried_during_a_graph_capture(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeCudaTensor(SimpleNamespace):
        __hash__ = object.__hash__

    x = FakeCudaTensor(is_cuda=True, device="cuda:0", shape=(2, 3, 8), dim=lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trial.run("adaln", lambda arguments: "by definition", x) == "by definition"
    assert not kernels.calls
    assert not trial._verdicts
