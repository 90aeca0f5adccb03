"""Prepacked weights give the results of plain ones, and reference mode prepacks nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kadr.kernels import matmul, mode
from kadr.kernels.cpu import int8 as cpu_int8
from kadr.kernels.cpu import tokens
from kadr.kernels.int8 import has_int8_units, quantize_rows
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.vae import VAE, blocks
from kadr.models.vae.blocks import DepthToSpaceUpsample, ResnetBlock3D
from kadr.nn.conv import CausalConv3d, ChunkedConv3d
from kadr.nn.linear import FusedGELU, Linear, QuantizesInput, linear_shared_input, mlp
from kadr.quant.convert import quantize_blocks
from kadr.quant.layers import Int8Linear
from kadr.quant.prepack import (
    PrepackedInt8Linear,
    PrepackedLinear,
    WinogradConv3d,
    prepack_convs,
    prepack_linears,
    should_prepack_convs,
    should_prepack_linears,
)
from tests.oracles import randn, relative_error
from tests.tiny_models import build_random, vae_config

CPU = torch.device("cpu")
CONFIG = TransformerConfig(num_layers=2, num_heads=4, head_dim=64, caption_channels=32, in_channels=8)
bfloat16 = pytest.mark.skipif(
    not should_prepack_linears(torch.bfloat16, CPU), reason="this CPU has no units for bfloat16"
)
vnni = pytest.mark.skipif(not has_int8_units(), reason="this CPU has no VNNI or AMX")
convolutions = pytest.mark.skipif(not should_prepack_convs(torch.float32, CPU), reason="torch has no oneDNN here")


def linear(columns: int = 64, outputs: int = 48) -> Linear:
    return build_random(lambda: Linear(columns, outputs))


def predict(transformer: Transformer, dtype: torch.dtype) -> torch.Tensor:
    tokens, text = randn(1, 200, 8).to(dtype), randn(1, 5, 32, seed=2).to(dtype)
    rope = transformer.compute_rope(40 * torch.rand(1, 3, 200, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        return transformer(tokens, rope, text, None, torch.tensor([[0.7]])).float()


@bfloat16
def test_a_prepacked_linear_equals_the_plain_one() -> None:
    plain = linear().bfloat16()
    prepacked, x = PrepackedLinear(plain.weight, plain.bias), randn(2, 7, 64, seed=3).bfloat16()
    assert isinstance(prepacked, FusedGELU)
    exact = F.linear(x.float(), plain.weight.float(), plain.bias.float())
    assert torch.equal(prepacked(x), plain(x))
    assert torch.equal(prepacked.with_gelu(x), plain.with_gelu(x))
    expected = F.gelu(exact, approximate="tanh")
    separate_gelu = F.gelu(plain(x), approximate="tanh").float()
    assert relative_error(prepacked.with_gelu(x).float(), expected) < relative_error(separate_gelu, expected)
    with mode.override(mode.REFERENCE):
        assert torch.equal(plain.with_gelu(x).float(), separate_gelu)


@vnni
def test_a_prepacked_int8_linear_equals_the_plain_one() -> None:
    codes, scale = quantize_rows(randn(48, 64) / 8)
    x, bias = randn(2, 7, 64, seed=3), randn(48, seed=2)
    plain = Int8Linear(codes, scale.flatten(), bias)
    assert relative_error(PrepackedInt8Linear(plain)(x), plain(x)) <= 1e-5
    exact = F.linear(x, codes * scale, bias)
    bf16_layer = Int8Linear(codes, scale.flatten(), bias.bfloat16())
    prepacked = PrepackedInt8Linear(bf16_layer)
    assert isinstance(prepacked, QuantizesInput)
    prepacked_output, plain_output = prepacked(x.bfloat16()).float(), bf16_layer(x.bfloat16()).float()
    assert relative_error(prepacked_output, exact) <= 1.2 * relative_error(plain_output, exact)


@vnni
def test_unsigned_rows_are_off_by_about_half_a_step_and_zeros_by_none() -> None:
    x = randn(5, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e4, 0.0])[:, None]
    for dtype, step in ((torch.float32, 0.5001), (torch.bfloat16, 0.51)):
        values = x.to(dtype)
        before = values.clone()
        rows = cpu_int8.quantize_rows_unsigned(values)
        dequantized = (rows.codes.float() - cpu_int8.ZERO_POINT) * rows.scales.float()
        assert torch.equal(values, before)
        assert ((dequantized - values.float()).abs() <= step * rows.scales.float()).all()
        assert not dequantized[4].any()


@vnni
def test_quantized_gelu_rows_match_torchs_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SLICE_ELEMENTS", 3 * 64)
    x = 3 * randn(10, 64)
    rows, expected = cpu_int8.quantize_rows_unsigned(x, gelu=True), F.gelu(x, approximate="tanh")
    dequantized = (rows.codes.float() - cpu_int8.ZERO_POINT) * rows.scales
    assert ((dequantized - expected).abs() <= 0.51 * rows.scales).all()


def test_layers_with_a_shared_input_quantize_it_once() -> None:
    class CountsQuantization(QuantizesInput):
        quantize_calls = 0

        def quantize_input(self, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
            CountsQuantization.quantize_calls += 1
            return F.gelu(x, approximate="tanh") if gelu else x

        def matmul(self, quantized: torch.Tensor) -> torch.Tensor:
            return 2 * quantized

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.matmul(self.quantize_input(x))

    x, up = randn(3, 64), linear()
    assert torch.equal(
        linear_shared_input(x, CountsQuantization(), CountsQuantization(), CountsQuantization())[2], 2 * x
    )
    assert CountsQuantization.quantize_calls == 1
    assert [output.shape for output in linear_shared_input(x, up, CountsQuantization())] == [(3, 48), (3, 64)]
    down = CountsQuantization()
    torch.testing.assert_close(mlp(up, down, x), 2 * F.gelu(up(x), approximate="tanh"))


@bfloat16
def test_a_prepacked_transformer_equals_the_plain_one() -> None:
    exact = predict(build_random(lambda: Transformer(CONFIG)), torch.float32)
    module = build_random(lambda: Transformer(CONFIG)).bfloat16()
    with mode.override(mode.REFERENCE):
        reference = relative_error(predict(module, torch.bfloat16), exact)
    plain = predict(module, torch.bfloat16)
    prepack_linears(module)
    assert not [child for child in module.modules() if isinstance(child, Linear)]
    assert torch.equal(predict(module, torch.bfloat16), plain)
    assert relative_error(plain, exact) <= 1.1 * reference


@vnni
def test_a_prepacked_int8_transformer_is_as_exact_as_the_plain_one() -> None:
    exact = predict(build_random(lambda: Transformer(CONFIG)), torch.float32)
    module = build_random(lambda: Transformer(CONFIG)).bfloat16()
    quantize_blocks(module, "int8", device=CPU)
    plain = relative_error(predict(module, torch.bfloat16), exact)
    prepack_linears(module)
    assert [child for child in module.modules() if isinstance(child, PrepackedInt8Linear)]
    assert relative_error(predict(module, torch.bfloat16), exact) <= 1.2 * plain


@convolutions
@pytest.mark.parametrize("family", ["0.9", "0.9.1", "0.9.5"])
@pytest.mark.parametrize("frames", [1, 9, 25])
def test_a_prepacked_vae_equals_the_plain_one(family: str, frames: int) -> None:
    module = build_random(lambda: VAE(vae_config(family)))
    pixels, latents = randn(2, 3, frames, 32, 64), randn(2, module.config.latent_channels, (frames - 1) // 8 + 1, 1, 2)
    options = {"timestep": torch.tensor([0.05, 0.1]), "noise_source": lambda shape: torch.ones(shape)}
    encoded, decoded = module.encode(pixels), module.decode(latents, **options)
    prepack_convs(module)
    assert [child for child in module.modules() if isinstance(child, WinogradConv3d)]
    assert relative_error(module.encode(pixels), encoded) <= 1e-5
    assert relative_error(module.decode(latents, **options), decoded) <= 1e-5
    streamed = torch.cat(list(module.decode_stream(latents, chunk_frames=2, **options)), dim=2)
    assert relative_error(streamed, decoded) <= 1e-5


def keep_channels_last(module: nn.Module) -> None:
    """Makes convolutions return channels_last_3d videos, as on a GPU with such weights."""
    for layer in module.modules():
        if isinstance(layer, CausalConv3d):
            plain = layer.convolve
            layer.convolve = lambda padded, add_bias, plain=plain: plain(padded, add_bias=add_bias).contiguous(
                memory_format=torch.channels_last_3d
            )


@pytest.mark.parametrize("adds_bias_to_skip", [True, False])
@pytest.mark.parametrize("prepare", [pytest.param(prepack_convs, marks=convolutions), keep_channels_last])
def test_the_decoder_keeps_channels_last_memory_throughout(
    prepare: Callable[[nn.Module], None], adds_bias_to_skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reordering a video costs as much as a convolution, and does not show in its values."""
    module, checked = build_random(lambda: VAE(vae_config("0.9.5"))).eval(), 0
    latents = randn(1, module.config.latent_channels, 9, 2, 3)
    with torch.no_grad():
        expected = module.decode(latents, timestep=torch.tensor([0.05]))
    prepare(module)
    monkeypatch.setattr(blocks, "adds_bias_to_skip", lambda x: adds_bias_to_skip)

    def assert_channels_last(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal checked
        for video in (output, *inputs[:1]) if layer is not module.decoder.conv_in else (output,):
            checked += bool(video.shape[2])
            assert not video.shape[2] or video.movedim(1, -1).is_contiguous(), (type(layer).__name__, video.shape)

    for layer in module.decoder.modules():
        if isinstance(layer, (ChunkedConv3d, ResnetBlock3D, DepthToSpaceUpsample)):
            layer.register_forward_hook(assert_channels_last)
    with torch.no_grad():
        output = torch.cat(list(module.decode_stream(latents, timestep=torch.tensor([0.05]), chunk_frames=2)), dim=2)
    assert checked > 100
    assert relative_error(output, expected) <= 1e-5


def test_in_place_decoding_without_gradients_gives_the_same() -> None:
    module = build_random(lambda: VAE(vae_config("0.9.5")))
    latents = randn(1, module.config.latent_channels, 2, 1, 2)
    with_gradient = module.requires_grad_(True).decode(latents, timestep=torch.tensor([0.05]))
    assert with_gradient.requires_grad
    with_gradient.sum().backward()
    with torch.no_grad():
        assert torch.equal(module.decode(latents, timestep=torch.tensor([0.05])), with_gradient)


def test_reference_mode_prepacks_nothing() -> None:
    module = build_random(lambda: Transformer(CONFIG)).bfloat16()
    requantized = build_random(lambda: Transformer(CONFIG)).bfloat16()
    quantize_blocks(requantized, "int8", device=CPU)
    with mode.override(mode.REFERENCE):
        assert not should_prepack_convs(torch.float32, CPU)
        prepack_linears(module)
        prepack_linears(requantized)
    assert not [child for child in module.modules() if isinstance(child, PrepackedLinear)]
    assert not [child for child in requantized.modules() if isinstance(child, PrepackedInt8Linear)]


def test_prepack_convs_releases_each_plain_weight() -> None:
    module, released = build_random(lambda: VAE(vae_config("0.9.5"))), []
    prepack_convs(module, release=released.extend)
    assert len(released) == len([child for child in module.modules() if isinstance(child, WinogradConv3d)]) > 0


def test_matmul_takes_wider_weights_under_autocast() -> None:
    x, weight, bias = torch.randn(3, 16).bfloat16(), torch.randn(8, 16), torch.randn(8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matmul.linear(x, weight, bias), F.linear(x, weight, bias))
        expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        assert torch.equal(matmul.linear_gelu(x, weight, bias), expected)


def test_plain_weights_are_freed_while_the_next_are_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    convs = [CausalConv3d(4, 4, causal=True) for _ in range(5)]
    module = nn.ModuleList(nn.Sequential(conv) for conv in convs)
    weights = [weakref.ref(conv) for conv in convs]
    del convs
    alive: list[int] = []
    prepack_convs(module, release=lambda _: alive.append(sum(reference() is not None for reference in weights)))
    assert alive == [5, 4, 3, 2, 1]
