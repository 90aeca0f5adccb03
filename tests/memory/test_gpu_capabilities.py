"""GPUs without bfloat16, int8 matmuls or 8-bit floats fall back: what torch says of them is faked, none was there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kadr import Engine, KadrWarning
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import RequestError
from kadr.kernels import fp8
from kadr.memory.device import FP32_MAX_PARAMETERS, can_hold, explain_dtype, has_fast_int8, pick_dtype
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.planning.calibration import probe
from kadr.planning.options.denoise import _resident_weight_options, _streamed_weight_options
from kadr.planning.placement import AS_STORED, CONVERTED
from kadr.quant.convert import quantize_blocks
from kadr.sampling.guidance import PromptEmbeddings, _project, guided_denoiser
from kadr.sampling.settings import Guidance
from kadr.spec.options import resolve_weight_format
from tests import tiny_models
from tests.oracles import randn

CUDA, MPS = torch.device("cuda"), torch.device("mps")
MANY = FP32_MAX_PARAMETERS
VOLTA, TURING, AMPERE, ADA = (7, 0), (7, 5), (8, 0), (8, 9)


def pretend_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(torch.version, "hip", hip)


def pretend_mac(patch: pytest.MonkeyPatch, major: int) -> None:
    patch.setattr(torch.backends.mps, "is_available", lambda: True)
    patch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: (major, 0) >= version)


@pytest.mark.parametrize(("capability", "has_it"), [(VOLTA, False), (TURING, False), (AMPERE, True), (ADA, True)])
def test_auto_dtype_is_float32_with_a_word_before_ampere(
    capability: tuple[int, int], has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, capability)
    assert pick_dtype("auto", CUDA, MANY) is (torch.bfloat16 if has_it else torch.float32)
    assert ("float32 is used" in explain_dtype("auto", CUDA, MANY)) is not has_it
    assert ("emulates it slowly" in explain_dtype("bfloat16", CUDA, MANY)) is not has_it
    assert explain_dtype("float32", CUDA, MANY) == explain_dtype("auto", CUDA, MANY - 1) == ""


@pytest.mark.parametrize(("macos", "has_it"), [(13, False), (14, True)])
def test_mps_computes_in_bfloat16_from_macos_14_on(macos: int, has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_mac(monkeypatch, macos)
    assert pick_dtype("auto", MPS, MANY) is (torch.bfloat16 if has_it else torch.float32)
    if not has_it:
        assert "macOS 14" in explain_dtype("auto", MPS, MANY)
        with pytest.raises(RequestError, match="macOS 14"):
            pick_dtype("bfloat16", MPS, MANY)


def test_numbers_of_amd_gpus_are_not_compared_with_those_of_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (11, 0), hip="6.4")  # gfx1100
    assert not fp8.has_fp8_units(CUDA)
    pretend_gpu(monkeypatch, (3, 0), hip="6.4")
    assert pick_dtype("auto", CUDA, MANY) is torch.bfloat16
    assert has_fast_int8(CUDA)


@pytest.mark.parametrize(
    ("device", "capability", "scheme", "expected"),
    [
        (CUDA, ADA, "fp8", "fp8"),
        (CUDA, AMPERE, "fp8", "fp8-weights"),
        (CUDA, TURING, "int8", "int8"),
        (CUDA, VOLTA, "int8", "int8-weights"),
        (MPS, VOLTA, "int8", "int8-weights"),
        (MPS, VOLTA, "fp8", "int8-weights"),
        (MPS, VOLTA, "fp8-weights", "int8-weights"),
        (MPS, VOLTA, "Q8_0", "Q8_0"),
    ],
)
def test_quantization_falls_back_to_what_the_device_has(
    device: torch.device, capability: tuple[int, int], scheme: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, capability)
    choice = resolve_weight_format(scheme, [], device)
    assert choice.name == expected
    assert (f"{expected} is used instead" in choice.notice) is (expected != scheme)


def test_stored_fp8_weights_are_converted_for_a_device_without_them(tmp_path: Path) -> None:
    home = tiny_models.write_model(tmp_path)
    source = Checkpoint.open(home / tiny_models.MODEL_FILE).sources["transformer"]
    as_fp8 = {name: SimpleNamespace(dtype=torch.float8_e4m3fn, ggml_type=None) for name in source.infos}
    loras = SimpleNamespace(is_merged=False)
    for device, storage in ((MPS, CONVERTED), (CUDA, AS_STORED)):
        spec = SimpleNamespace(quant="none", loras=loras)
        context: Any = SimpleNamespace(device=device, dtype=torch.bfloat16, on_cpu=False, spec=spec)
        stored: Any = SimpleNamespace(infos=as_fp8, dtype=torch.float8_e4m3fn)
        assert [option.weight_format for option in _resident_weight_options(context, stored)][-1] == storage
        assert {option.weight_format for option in _streamed_weight_options(context, stored)} == {storage}


def test_dtype_that_is_not_bfloat16_is_said_when_a_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tiny_models.write_model(tmp_path)
    pretend_mac(monkeypatch, 13)
    monkeypatch.setattr("kadr.memory.device.FP32_MAX_PARAMETERS", 0)
    with pytest.warns(KadrWarning, match="mps has no bfloat16.*float32 is used"):
        engine = Engine.open(home / tiny_models.MODEL_FILE, device="mps")
    assert engine.spec.dtype is torch.float32
    assert "float32 is used" in engine.spec.notices[0]


def test_a_bad_cudnn_is_said_when_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tiny_models.write_model(tmp_path)
    pretend_gpu(monkeypatch, AMPERE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.warns(KadrWarning, match=r"cuDNN 9\.10\.2"):
        spec = Engine.open(home / tiny_models.MODEL_FILE, device="cuda").spec
    assert any("9.15.1" in notice for notice in spec.notices)


@pytest.mark.parametrize(("device", "module"), [(CUDA, torch.cuda), (MPS, torch.mps)], ids=["cuda", "mps"])
def test_the_rate_of_a_gpu_is_measured_with_its_queue_empty(
    device: torch.device, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, a product takes as long as it takes to queue it: machines would seem thousands of times faster."""
    seconds, events = [0.0], []

    def read_clock() -> float:
        seconds[0] += 1e-6
        return seconds[0]

    def synchronize(*_: Any) -> None:
        if events and events[-1] == "queued":
            seconds[0] += 0.1
        events.append("empty")

    monkeypatch.setattr(module, "synchronize", synchronize)
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: shape)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: events.append("queued"))
    monkeypatch.setattr("time.perf_counter", read_clock)
    rate = probe.measure_matmul_rate.__wrapped__(torch.float32, device)
    assert rate == pytest.approx(2 * probe._ROWS * probe._IN_FEATURES * probe._OUT_FEATURES / 0.1, rel=1e-3)
    assert events[:3] == ["empty", "queued", "empty"]


class RefuseMissingDtypes(TorchDispatchMode):
    """Raises where an operator makes a tensor that MPS cannot hold. Operators run on the CPU: its dtypes are MPS's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not can_hold(MPS, tensor.dtype):
                raise TypeError(f"{function} makes {tensor.dtype}, which MPS does not have")
        return result


def test_dtypes_that_mps_lacks_are_noticed() -> None:
    with RefuseMissingDtypes():
        for dtype in (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
            with pytest.raises(TypeError, match=str(dtype)):
                torch.ones(2).to(dtype)


def test_adaptive_projected_guidance_on_mps_needs_no_float64() -> None:
    with FakeTensorMode(), RefuseMissingDtypes():
        update, clean = (torch.empty(1, 8, 4, device=MPS) for _ in range(2))
        assert _project(update, clean).device.type == "mps"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", ["none", "int8-weights", "Q8_0", "Q4_K"])
@torch.no_grad()
def test_transformer_needs_no_dtype_that_mps_lacks(quant: str, dtype: torch.dtype) -> None:
    config = replace(tiny_models.transformer_config(), num_heads=4, head_dim=64)
    transformer = tiny_models.build_random(lambda: Transformer(config)).to(dtype)
    if quant != "none":
        quantize_blocks(transformer, quant, device=torch.device("cpu"))
    embeddings, tokens = randn(1, 5, tiny_models.TEXT_WIDTH).to(dtype), randn(1, 8, tiny_models.CHANNELS)
    with RefuseMissingDtypes():
        rope = transformer.compute_rope(torch.rand(1, 3, 8))

        def model(tokens: Tensor, sigma: Tensor, prompt: PromptEmbeddings, perturbation: Any = None) -> Any:
            return transformer(tokens.to(dtype), rope, prompt.embeddings, prompt.mask, sigma).float(), None

        text = PromptEmbeddings(embeddings, torch.ones(1, 5))
        guidance = Guidance(cfg_scale=3.0, stg_scale=0.0, rescale=0.7, cfg_star=True)
        assert guided_denoiser(model, text, text, guidance)(1.0, tokens, torch.ones(1, 1)).isfinite().all()


@pytest.mark.parametrize("family", ["0.9", "0.9.1", "0.9.5"])
@torch.no_grad()
def test_vae_and_text_encoder_need_no_dtype_that_mps_lacks(family: str) -> None:
    config = tiny_models.vae_config(family)
    vae = tiny_models.build_random(lambda: VAE(config)).eval()
    encoder = tiny_models.build_random(lambda: T5Encoder(tiny_models.t5_config())).eval()
    with RefuseMissingDtypes():
        timestep = torch.full((1,), 0.05) if config.timestep_conditioning else None
        pixels = vae.decode(randn(1, tiny_models.CHANNELS, 2, 2, 2), timestep=timestep, noise_source=torch.zeros)
        assert vae.encode(pixels).shape == (1, tiny_models.CHANNELS, 2, 2, 2)
        assert encoder(torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6)).isfinite().all()
