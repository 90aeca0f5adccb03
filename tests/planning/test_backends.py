"""What a plan says that a stage is computed by is what its modules then are."""

from __future__ import annotations

import pytest
import torch

from kadr.kernels import mode
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.engine import Engine
from kadr.pipeline.module_placement import place_module
from kadr.planning import backends
from kadr.planning.plan import AS_STORED, CONVERTED, Placement
from kadr.quant.prepack import PrepackedInt8Linear, PrepackedLinear, WinogradConv3d
from kadr.request.request import Request
from tests.pipeline.test_compiled import CONFIG
from tests.tiny_models import build_random, vae_config

CPU = torch.device("cpu")


def has(module: torch.nn.Module, kind: type) -> bool:
    return any(isinstance(child, kind) for child in module.modules())


@pytest.mark.parametrize("kernels", [mode.AUTO, mode.REFERENCE])
@pytest.mark.parametrize("hold", [CONVERTED, "int8", "int8-weights"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices(dtype: str, hold: str, kernels: str) -> None:
    with mode.override(kernels):
        kind = getattr(torch, dtype)
        module = place_module(
            build_random(lambda: Transformer(CONFIG)).to(kind), Placement(dtype=dtype, weight_format=hold), CPU
        )
        said = backends.matmul_backend(kind, CPU, hold, is_streamed=False)
    packed = has(module, PrepackedInt8Linear) if hold == "int8" else has(module, PrepackedLinear)
    assert ("packed weights" in said) == packed
    assert ("KADR_KERNELS=reference" in said) == (kernels == mode.REFERENCE)
    assert not (packed and kernels == mode.REFERENCE)


def test_streamed_blocks_are_not_packed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert "packed" not in backends.matmul_backend(dtype, CPU, AS_STORED, is_streamed=True)


@pytest.mark.parametrize("kernels", [mode.AUTO, mode.REFERENCE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolutions(dtype: str, kernels: str) -> None:
    with mode.override(kernels):
        kind = getattr(torch, dtype)
        module = place_module(build_random(lambda: VAE(vae_config("0.9.5"))).to(kind), Placement(dtype=dtype), CPU)
        assert backends.conv_backend(kind, CPU).startswith("Winograd") == has(module, WinogradConv3d)


def test_a_gpu_that_kernels_are_not_written_for_computes_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (7, 5), (9, 0)
    for capability, said in ((old, "torch"), (new, "fused kernels")):
        monkeypatch.setattr(backends.trial, "_capability", lambda device, found=capability: found)
        assert backends.matmul_backend(torch.bfloat16, torch.device("cuda"), CONVERTED, is_streamed=False) == said
        assert backends.conv_backend(torch.bfloat16, torch.device("cuda")) == f"{said}, channels last"


def test_the_plan_says_it() -> None:
    request = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2)
    plan = Engine.open("demo", device="cpu").plan(request)
    path = backends.conv_backend(torch.float32, CPU)
    assert plan.stage("decode").placement.backend == path
    assert plan.to_json()["stages"][-1]["path"] == path
    assert f"  {path}  " in str(plan)
