"""--compile gives the same velocities, with one compilation for all blocks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from kadr.errors import RequestError
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.pipeline.engine import Engine
from kadr.pipeline.loading.module_placement import compile_blocks
from kadr.quant.convert import quantize_blocks
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES
from tests.oracles import randn
from tests.tiny_models import build_random

CONFIG = TransformerConfig(num_layers=3, num_heads=4, head_dim=16, caption_channels=32, in_channels=8)
BACKEND = "aot_eager"  # all of the compiler except its last stage, which needs a C++ or CUDA compiler
SIGMA = torch.tensor([[0.7]])
MASK = torch.tensor([[True, True, False, True, False]])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build_transformer(scheme: str | None) -> Transformer:
    transformer = build_random(lambda: Transformer(CONFIG))
    if scheme is not None:
        quantize_blocks(transformer, scheme, device=torch.device("cpu"))
    return transformer


def velocities(transformer: Transformer, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Returns the velocity, and those with a block perturbed in both attention modes."""
    rope = transformer.compute_rope(40 * torch.rand(1, 3, 12, generator=torch.Generator().manual_seed(1)))
    inputs = (randn(1, 12, 8), rope, randn(1, 5, 32, seed=2), mask, SIGMA)
    with torch.no_grad():
        plain = transformer(*inputs)
        modes = (ATTENTION_VALUES, ATTENTION_SKIP)
        return [plain, *(transformer.forward_with_perturbed(*inputs, blocks=[1], mode=mode)[1] for mode in modes)]


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("scheme", [None, "int8", "fp8", "int8-weights", "Q8_0"])
def test_compiled_blocks_match_uncompiled_ones(scheme: str | None, mask: torch.Tensor | None) -> None:
    expected, transformer = velocities(build_transformer(scheme), mask), build_transformer(scheme)
    compile_blocks(transformer, BACKEND)
    for velocity, expected_velocity in zip(velocities(transformer, mask), expected, strict=True):
        torch.testing.assert_close(velocity, expected_velocity)
    assert counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
def test_one_compilation_serves_all_blocks(scheme: str | None) -> None:
    transformer = build_transformer(scheme)
    compile_blocks(transformer, BACKEND)
    rope = transformer.compute_rope(40 * torch.rand(1, 3, 12, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for seed in (0, 1):
            transformer(randn(1, 12, 8, seed=seed), rope, randn(1, 5, 32, seed=2), None, SIGMA)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_compile_is_refused_off_cuda_before_loading() -> None:
    with pytest.raises(RequestError, match=r"--compile is for CUDA only: on cpu .*Leave --compile out"):
        Engine.open("no-such-model", device="cpu", compile_transformer=True)


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("scheme", [None, "Q8_0"])
def test_compiled_transformer_is_freed_with_its_last_reference(scheme: str | None) -> None:
    transformer = build_transformer(scheme)
    compile_blocks(transformer, BACKEND)
    velocities(transformer)
    references = [weakref.ref(module) for module in transformer.modules()]
    del transformer
    assert not any(reference() for reference in references)
