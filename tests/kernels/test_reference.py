"""Definitions of fused operations: what the layers compute, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import int8, reference
from kadr.models.transformer import FeedForward
from kadr.models.vae.blocks import ResnetBlock3D
from kadr.nn.modulation import AdaLNParams
from kadr.nn.norm import RMSNorm, rms_norm
from kadr.nn.rope import rope_table
from kadr.nn.temporal_cache import TemporalCache
from kadr.quant.convert import quantize_rows_fp8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def video(dtype: torch.dtype) -> Tensor:
    return drawn(2, 32, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_edges_of_a_branch_are_those_of_a_layer(dtype: torch.dtype, count: int) -> None:
    x, branch = drawn(2, 5, 48, dtype=dtype), drawn(2, 5, 48, seed=1, dtype=dtype)
    bend = AdaLNParams(*drawn(2, count, 3, 48, seed=2, dtype=dtype).unbind(-2))
    ended = torch.addcmul(x, bend.gate, branch)
    entered = bend(rms_norm(ended))
    assert torch.equal(reference.norm_modulate(x, bend.scale, bend.shift), bend(rms_norm(x)))
    assert torch.equal(reference.gate_residual(x, bend.gate, branch), ended)
    assert torch.equal(reference.gate_residual(x, None, branch), x + branch)
    made = reference.gate_residual_norm_modulate(x, bend.gate, branch, bend.scale, bend.shift)
    assert torch.equal(made[0], ended)
    assert torch.equal(made[1], entered)
    assert entered.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formulas_are_those_of_the_paper(dtype: torch.dtype) -> None:
    """Without the layers: x / rms(x) · (1 + scale) + shift, and x + gate · branch, in fp64."""
    x, branch, scale, shift, gate = (drawn(2, 5, 48, seed=seed, dtype=dtype) for seed in range(5))
    right = x.double() + gate.double() * branch.double()
    normed = right / (right.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale.double()) + shift.double()
    made = reference.gate_residual_norm_modulate(x, gate, branch, scale, shift)
    bound = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    torch.testing.assert_close(made[0].double(), right, rtol=bound, atol=bound)
    torch.testing.assert_close(made[1].double(), normed, rtol=bound, atol=2 * bound)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_normalised_and_turned_as_in_attention(dtype: torch.dtype, samples: int) -> None:
    norm = RMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    positions = drawn(samples, 3, 5, seed=1).abs() * 100
    rope = rope_table(positions, 48, max_positions=(20.0, 2048.0, 2048.0), theta=10000.0, dtype=dtype)
    x = drawn(2, 5, 48, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(reference.norm_rope(x, norm.weight, rope.cosine, rope.sine), rope(norm(x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_those_that_weights_are_stored_in(dtype: torch.dtype) -> None:
    x = drawn(5, 64, dtype=dtype) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 1e3]).to(dtype)[:, None]
    for kind, right in ((torch.int8, int8.quantize_rows(x)), (E4M3, quantize_rows_fp8(x))):
        codes, scale = reference.quantize_rows(x, kind)
        assert codes.dtype == kind
        assert torch.equal(codes.float(), right[0].float())
        assert torch.equal(scale, right[1])


@pytest.mark.parametrize("kind", [torch.int8, E4M3])
def test_quantizing_after_an_operation_is_quantizing_its_result(kind: torch.dtype) -> None:
    x, branch, scale, shift, gate = (drawn(2, 5, 48, seed=seed) for seed in range(5))
    ended, entered = reference.gate_residual_norm_modulate(x, gate, branch, scale, shift)
    for made, right in (
        (reference.norm_modulate_quantize(x, scale, shift, kind), reference.norm_modulate(x, scale, shift)),
        (reference.gate_residual_norm_modulate_quantize(x, gate, branch, scale, shift, kind)[1:], entered),
        (reference.gelu_quantize(x[0], kind), F.gelu(x[0], approximate="tanh")),
    ):
        codes, factors = made
        expected = reference.quantize_rows(right, kind)
        assert torch.equal(codes.float(), expected[0].float())
        assert torch.equal(factors, expected[1])
        assert factors.shape == (*right.shape[:-1], 1)
    assert torch.equal(reference.gate_residual_norm_modulate_quantize(x, gate, branch, scale, shift, kind)[0], ended)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_feed_forward_in_eight_bits_is_its_pieces(dtype: torch.dtype, biased: bool) -> None:
    """GELU and rounding in one, the bare product, scales and bias in one: what `int8.linear` makes of a GELU."""
    x, (weight, scale) = drawn(20, 64, dtype=dtype), int8.quantize_rows(drawn(48, 64, seed=1))
    bias = drawn(48, seed=2).to(dtype) if biased else None
    codes, factors = reference.gelu_quantize(x, torch.int8)
    made = reference.rescale(torch._int_mm(codes, weight.t()), factors, scale.flatten(), bias, dtype)
    assert torch.equal(made, int8.linear(F.gelu(x, approximate="tanh"), weight, scale.flatten(), bias))


def test_the_gelu_is_that_of_the_feed_forward() -> None:
    layer = FeedForward(8, 16, 8).requires_grad_(False)
    x = drawn(3, 8)
    codes, factors = reference.gelu_quantize(layer.up(x), torch.int8)
    torch.testing.assert_close(layer.down(codes * factors), layer(x), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_before_a_convolution_is_that_of_a_residual_layer(dtype: torch.dtype) -> None:
    x = video(dtype)
    shift, scale = drawn(2, 2, 32, seed=1, dtype=dtype).unbind(1)
    normed = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)
    bent = normed * (1 + scale[..., None, None, None]) + shift[..., None, None, None]
    for made, right in (
        (reference.pixel_norm_modulate_silu(x), F.silu(normed)),
        (reference.pixel_norm_modulate_silu(x, scale, shift), F.silu(bent)),
    ):
        assert torch.equal(made, right)
        assert made.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skip_is_added_as_in_a_residual_layer(dtype: torch.dtype) -> None:
    x, skip, bias = video(dtype), video(dtype) + 1, drawn(32, seed=1, dtype=dtype)
    for given, right in ((None, skip + x), (bias, skip + (x + bias[:, None, None, None]))):
        made = reference.bias_residual(x, given, skip)
        assert torch.equal(made, right)
        assert made.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_residual_layer_can_be_put_together_from_them() -> None:
    torch.manual_seed(0)
    layer, x = ResnetBlock3D(32, 32, causal=True).requires_grad_(False), video(torch.float32)
    right, stream = layer(x, TemporalCache.single_chunk()), TemporalCache.single_chunk()
    middle = layer.conv1(reference.pixel_norm_modulate_silu(x), stream)
    bias, layer.conv2.bias = layer.conv2.bias, None
    main = layer.conv2(reference.pixel_norm_modulate_silu(middle), stream)
    torch.testing.assert_close(reference.bias_residual(main, bias, x), right)
