"""The backend that a plan names is the one its modules use."""

from __future__ import annotations

import pytest
import torch

from kadr.kernels import mode
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.engine import Engine
from kadr.pipeline.loading.module_placement import place_module
from kadr.planning import backends
from kadr.planning.placement import AS_STORED, CONVERTED, Placement
from kadr.quant.prepack import PrepackedInt8Linear, PrepackedLinear, WinogradConv3d
from kadr.request.request import Request
from tests.pipeline.test_compiled import CONFIG
from tests.tiny_models import build_random, vae_config

CPU = torch.device("cpu")


def has_layer(module: torch.nn.Module, layer_class: type) -> bool:
    return any(isinstance(child, layer_class) for child in module.modules())


@pytest.mark.parametrize("kernels", [mode.AUTO, mode.REFERENCE])
@pytest.mark.parametrize("weight_format", [CONVERTED, "int8", "int8-weights"])
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_matmul_backend_says_whether_linears_are_prepacked(dtype_name: str, weight_format: str, kernels: str) -> None:
    with mode.override(kernels):
        dtype = getattr(torch, dtype_name)
        module = place_module(
            build_random(lambda: Transformer(CONFIG)).to(dtype),
            Placement(dtype=dtype_name, weight_format=weight_format),
            CPU,
        )
        backend = backends.matmul_backend(dtype, CPU, weight_format, is_streamed=False)
    is_prepacked = has_layer(module, PrepackedInt8Linear if weight_format == "int8" else PrepackedLinear)
    assert ("packed weights" in backend) == is_prepacked
    assert ("KADR_KERNELS=reference" in backend) == (kernels == mode.REFERENCE)
    assert not (is_prepacked and kernels == mode.REFERENCE)


def test_streamed_blocks_are_not_prepacked() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert "packed" not in backends.matmul_backend(dtype, CPU, AS_STORED, is_streamed=True)


@pytest.mark.parametrize("kernels", [mode.AUTO, mode.REFERENCE])
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_conv_backend_says_whether_convolutions_are_winograd(dtype_name: str, kernels: str) -> None:
    with mode.override(kernels):
        dtype = getattr(torch, dtype_name)
        module = place_module(
            build_random(lambda: VAE(vae_config("0.9.5"))).to(dtype), Placement(dtype=dtype_name), CPU
        )
        is_winograd = has_layer(module, WinogradConv3d)
        assert backends.conv_backend(dtype, CPU).startswith("Winograd") == is_winograd


def test_old_gpu_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, backend in (((7, 5), "torch"), ((9, 0), "fused kernels")):
        monkeypatch.setattr(backends.trial, "_capability", lambda device, capability=capability: capability)
        cuda = torch.device("cuda")
        assert backends.matmul_backend(torch.bfloat16, cuda, CONVERTED, is_streamed=False) == backend
        assert backends.conv_backend(torch.bfloat16, cuda) == f"{backend}, channels last"


def test_plan_text_and_json_name_the_backend() -> None:
    request = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2)
    plan = Engine.open("demo", device="cpu").plan(request)
    backend = backends.conv_backend(torch.float32, CPU)
    assert plan.stage("decode").placement.backend == backend
    assert plan.to_json()["stages"][-1]["backend"] == backend
    assert f"  {backend}  " in str(plan)
