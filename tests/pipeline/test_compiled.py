"""--compile: the same velocities, by one compilation for all layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from kadr.errors import RequestError
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.pipeline.engine import Engine
from kadr.pipeline.module_placement import compile_blocks
from kadr.quant.convert import quantize_blocks
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES
from tests.oracles import randn
from tests.tiny_models import build_random

CONFIG = TransformerConfig(num_layers=3, num_heads=4, head_dim=16, caption_channels=32, in_channels=8)
BACKEND = "aot_eager"  # all of the compiler but for its last stage, which needs one of C++ or of CUDA
LEVEL = torch.tensor([[0.7]])
MASK = torch.tensor([[True, True, False, True, False]])


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(scheme: str | None) -> Transformer:
    transformer = build_random(lambda: Transformer(CONFIG))
    if scheme is not None:
        quantize_blocks(transformer, scheme, device=torch.device("cpu"))
    return transformer


def velocities(transformer: Transformer, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Plain, and with a block disturbed in either way."""
    rope = transformer.compute_rope(40 * torch.rand(1, 3, 12, generator=torch.Generator().manual_seed(1)))
    given = (randn(1, 12, 8), rope, randn(1, 5, 32, seed=2), mask, LEVEL)
    with torch.no_grad():
        plain = transformer(*given)
        modes = (ATTENTION_VALUES, ATTENTION_SKIP)
        return [plain, *(transformer.forward_with_perturbed(*given, blocks=[1], mode=mode)[1] for mode in modes)]


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("scheme", [None, "int8", "fp8", "int8-weights", "Q8_0"])
def test_compiled_layers_give_what_the_plain_ones_give(scheme: str | None, mask: torch.Tensor | None) -> None:
    right, transformer = velocities(made(scheme), mask), made(scheme)
    compile_blocks(transformer, BACKEND)
    for velocity, plain in zip(velocities(transformer, mask), right, strict=True):
        torch.testing.assert_close(velocity, plain)
    assert counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
def test_one_compilation_serves_all_layers(scheme: str | None) -> None:
    transformer = made(scheme)
    compile_blocks(transformer, BACKEND)
    rope = transformer.compute_rope(40 * torch.rand(1, 3, 12, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for seed in (0, 1):
            transformer(randn(1, 12, 8, seed=seed), rope, randn(1, 5, 32, seed=2), None, LEVEL)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_off_cuda_it_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(RequestError, match=r"layers are compiled for CUDA alone: on cpu .*Leave --compile out"):
        Engine.open("no-such-model", device="cpu", compile_transformer=True)
