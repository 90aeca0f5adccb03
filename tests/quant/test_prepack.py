"""Weights in the order of the CPU's kernels: the same answers, and a switch that leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kadr.kernels import int8, matmul, mode
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
vnni = pytest.mark.skipif(not int8.has_int8_units(), reason="this CPU has no units for products in 8 bits")
convolutions = pytest.mark.skipif(not should_prepack_convs(torch.float32, CPU), reason="torch has no oneDNN here")


def linear(columns: int = 64, outputs: int = 48) -> Linear:
    return build_random(lambda: Linear(columns, outputs))


def answer(transformer: Transformer, dtype: torch.dtype) -> torch.Tensor:
    tokens, text = randn(1, 200, 8).to(dtype), randn(1, 5, 32, seed=2).to(dtype)
    rope = transformer.compute_rope(40 * torch.rand(1, 3, 200, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        return transformer(tokens, rope, text, None, torch.tensor([[0.7]])).float()


@bfloat16
def test_a_packed_matrix_gives_what_the_plain_one_gives() -> None:
    plain = linear().bfloat16()
    packed, x = PrepackedLinear(plain.weight, plain.bias), randn(2, 7, 64, seed=3).bfloat16()
    assert isinstance(packed, FusedGELU)
    exact = F.linear(x.float(), plain.weight.float(), plain.bias.float())
    assert torch.equal(packed(x), plain(x))
    assert torch.equal(packed.with_gelu(x), plain.with_gelu(x))
    bent = F.gelu(exact, approximate="tanh")
    in_two = F.gelu(plain(x), approximate="tanh").float()
    assert relative_error(packed.with_gelu(x).float(), bent) < relative_error(in_two, bent)
    with mode.override(mode.REFERENCE):
        assert torch.equal(plain.with_gelu(x).float(), in_two)


@vnni
def test_a_packed_layer_in_8_bits_gives_what_the_plain_one_gives() -> None:
    numbers, scale = int8.quantize_rows(randn(48, 64) / 8)
    x, bias = randn(2, 7, 64, seed=3), randn(48, seed=2)
    plain = Int8Linear(numbers, scale.flatten(), bias)
    assert relative_error(PrepackedInt8Linear(plain)(x), plain(x)) <= 1e-5
    exact = F.linear(x, numbers * scale, bias)
    narrow = Int8Linear(numbers, scale.flatten(), bias.bfloat16())
    packed = PrepackedInt8Linear(narrow)
    assert isinstance(packed, QuantizesInput)
    own, theirs = packed(x.bfloat16()).float(), narrow(x.bfloat16()).float()
    assert relative_error(own, exact) <= 1.2 * relative_error(theirs, exact)


@vnni
def test_rows_in_8_bits_come_back_within_a_step_and_zeros_as_zeros() -> None:
    x = randn(5, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e4, 0.0])[:, None]
    for dtype, step in ((torch.float32, 0.5001), (torch.bfloat16, 0.51)):
        own = x.to(dtype)
        before = own.clone()
        rows = int8.quantize_rows_unsigned(own)
        back = (rows.codes.float() - int8.ZERO_POINT) * rows.scales.float()
        assert torch.equal(own, before)
        assert ((back - own.float()).abs() <= step * rows.scales.float()).all()
        assert not back[4].any()


@vnni
def test_the_gelu_of_rows_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "ACTIVATION_SLICE_ELEMENTS", 3 * 64)
    x = 3 * randn(10, 64)
    rows, bent = int8.quantize_rows_unsigned(x, gelu=True), F.gelu(x, approximate="tanh")
    back = (rows.codes.float() - int8.ZERO_POINT) * rows.scales
    assert ((back - bent).abs() <= 0.51 * rows.scales).all()


def test_layers_of_one_input_share_what_is_done_to_it_and_others_do_not() -> None:
    class Counting(QuantizesInput):
        times = 0

        def quantize_input(self, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
            Counting.times += 1
            return F.gelu(x, approximate="tanh") if gelu else x

        def matmul(self, quantized: torch.Tensor) -> torch.Tensor:
            return 2 * quantized

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.matmul(self.quantize_input(x))

    x, up = randn(3, 64), linear()
    assert torch.equal(linear_shared_input(x, Counting(), Counting(), Counting())[2], 2 * x)
    assert Counting.times == 1
    assert [made.shape for made in linear_shared_input(x, up, Counting())] == [(3, 48), (3, 64)]
    down = Counting()
    torch.testing.assert_close(mlp(up, down, x), 2 * F.gelu(up(x), approximate="tanh"))


@bfloat16
def test_a_packed_transformer_gives_what_the_plain_one_gives() -> None:
    exact = answer(build_random(lambda: Transformer(CONFIG)), torch.float32)
    module = build_random(lambda: Transformer(CONFIG)).bfloat16()
    with mode.override(mode.REFERENCE):
        reference = relative_error(answer(module, torch.bfloat16), exact)
    plain = answer(module, torch.bfloat16)
    prepack_linears(module)
    assert not [child for child in module.modules() if isinstance(child, Linear)]
    assert torch.equal(answer(module, torch.bfloat16), plain)
    assert relative_error(plain, exact) <= 1.1 * reference


@vnni
def test_a_packed_transformer_in_8_bits_is_as_near_as_the_plain_one() -> None:
    exact = answer(build_random(lambda: Transformer(CONFIG)), torch.float32)
    module = build_random(lambda: Transformer(CONFIG)).bfloat16()
    quantize_blocks(module, "int8", device=CPU)
    plain = relative_error(answer(module, torch.bfloat16), exact)
    prepack_linears(module)
    assert [child for child in module.modules() if isinstance(child, PrepackedInt8Linear)]
    assert relative_error(answer(module, torch.bfloat16), exact) <= 1.2 * plain


@convolutions
@pytest.mark.parametrize("family", ["0.9", "0.9.1", "0.9.5"])
@pytest.mark.parametrize("frames", [1, 9, 25])
def test_a_packed_vae_gives_what_the_plain_one_gives(family: str, frames: int) -> None:
    module = build_random(lambda: VAE(vae_config(family)))
    pixels, latents = randn(2, 3, frames, 32, 64), randn(2, module.config.latent_channels, (frames - 1) // 8 + 1, 1, 2)
    given = {"timestep": torch.tensor([0.05, 0.1]), "noise_source": lambda shape: torch.ones(shape)}
    encoded, decoded = module.encode(pixels), module.decode(latents, **given)
    prepack_convs(module)
    assert [child for child in module.modules() if isinstance(child, WinogradConv3d)]
    assert relative_error(module.encode(pixels), encoded) <= 1e-5
    assert relative_error(module.decode(latents, **given), decoded) <= 1e-5
    streamed = torch.cat(list(module.decode_stream(latents, chunk_frames=2, **given)), dim=2)
    assert relative_error(streamed, decoded) <= 1e-5


def lay(module: nn.Module) -> None:
    """As on a GPU, whose convolutions give back videos that lie as the weights do."""
    for layer in module.modules():
        if isinstance(layer, CausalConv3d):
            plain = layer.convolve
            layer.convolve = lambda padded, add_bias, plain=plain: plain(padded, add_bias=add_bias).contiguous(
                memory_format=torch.channels_last_3d
            )


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("ready", [pytest.param(prepack_convs, marks=convolutions), lay])
def test_videos_keep_their_channels_last_all_the_way(
    ready: Callable[[nn.Module], None], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reorders a video costs as much as a convolution; its numbers say nothing of it."""
    module, seen = build_random(lambda: VAE(vae_config("0.9.5"))).eval(), 0
    latents = randn(1, module.config.latent_channels, 9, 2, 3)
    with torch.no_grad():
        right = module.decode(latents, timestep=torch.tensor([0.05]))
    ready(module)
    monkeypatch.setattr(blocks, "adds_bias_to_skip", lambda x: together)

    def lies_last(layer: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        nonlocal seen
        for video in (made, *given[:1]) if layer is not module.decoder.conv_in else (made,):
            seen += bool(video.shape[2])
            assert not video.shape[2] or video.movedim(1, -1).is_contiguous(), (type(layer).__name__, video.shape)

    for layer in module.decoder.modules():
        if isinstance(layer, (ChunkedConv3d, ResnetBlock3D, DepthToSpaceUpsample)):
            layer.register_forward_hook(lies_last)
    with torch.no_grad():
        made = torch.cat(list(module.decode_stream(latents, timestep=torch.tensor([0.05]), chunk_frames=2)), dim=2)
    assert seen > 100
    assert relative_error(made, right) <= 1e-5


def test_without_gradients_a_vae_works_in_place_and_gives_the_same() -> None:
    module = build_random(lambda: VAE(vae_config("0.9.5")))
    latents = randn(1, module.config.latent_channels, 2, 1, 2)
    taught = module.requires_grad_(True).decode(latents, timestep=torch.tensor([0.05]))
    assert taught.requires_grad
    taught.sum().backward()
    with torch.no_grad():
        assert torch.equal(module.decode(latents, timestep=torch.tensor([0.05])), taught)


def test_the_switch_leaves_weights_as_they_are() -> None:
    module = build_random(lambda: Transformer(CONFIG)).bfloat16()
    requantized = build_random(lambda: Transformer(CONFIG)).bfloat16()
    quantize_blocks(requantized, "int8", device=CPU)
    with mode.override(mode.REFERENCE):
        assert not should_prepack_convs(torch.float32, CPU)
        prepack_linears(module)
        prepack_linears(requantized)
    assert not [child for child in module.modules() if isinstance(child, PrepackedLinear)]
    assert not [child for child in requantized.modules() if isinstance(child, PrepackedInt8Linear)]


def test_who_needed_a_packed_weight_no_more_is_told() -> None:
    module, told = build_random(lambda: VAE(vae_config("0.9.5"))), []
    prepack_convs(module, release=told.extend)
    assert len(told) == len([child for child in module.modules() if isinstance(child, WinogradConv3d)]) > 0


def test_under_autocast_without_gradients_wider_weights_are_multiplied_too() -> None:
    x, weight, bias = torch.randn(3, 16).bfloat16(), torch.randn(8, 16), torch.randn(8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matmul.linear(x, weight, bias), F.linear(x, weight, bias))
        right = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        assert torch.equal(matmul.linear_gelu(x, weight, bias), right)
