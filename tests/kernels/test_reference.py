"""Definitions of the fused operations equal what the layers compute, to the bit."""

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


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def video(dtype: torch.dtype) -> Tensor:
    return randn(2, 32, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_branch_operations_equal_the_layers_to_the_bit(dtype: torch.dtype, count: int) -> None:
    x, branch = randn(2, 5, 48, dtype=dtype), randn(2, 5, 48, seed=1, dtype=dtype)
    adaln = AdaLNParams(*randn(2, count, 3, 48, seed=2, dtype=dtype).unbind(-2))
    residual = torch.addcmul(x, adaln.gate, branch)
    modulated = adaln(rms_norm(residual))
    assert torch.equal(reference.norm_modulate(x, adaln.scale, adaln.shift), adaln(rms_norm(x)))
    assert torch.equal(reference.gate_residual(x, adaln.gate, branch), residual)
    assert torch.equal(reference.gate_residual(x, None, branch), x + branch)
    output = reference.gate_residual_norm_modulate(x, adaln.gate, branch, adaln.scale, adaln.shift)
    assert torch.equal(output[0], residual)
    assert torch.equal(output[1], modulated)
    assert modulated.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_branch_operations_match_the_papers_formulas_in_fp64(dtype: torch.dtype) -> None:
    """x / rms(x) · (1 + scale) + shift, and x + gate · branch, without the layers."""
    x, branch, scale, shift, gate = (randn(2, 5, 48, seed=seed, dtype=dtype) for seed in range(5))
    expected = x.double() + gate.double() * branch.double()
    normed = expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale.double()) + shift.double()
    output = reference.gate_residual_norm_modulate(x, gate, branch, scale, shift)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    torch.testing.assert_close(output[0].double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output[1].double(), normed, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rope_equals_the_norm_and_rope_of_attention(dtype: torch.dtype, samples: int) -> None:
    norm = RMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    positions = randn(samples, 3, 5, seed=1).abs() * 100
    rope = rope_table(positions, 48, max_positions=(20.0, 2048.0, 2048.0), theta=10000.0)
    x = randn(2, 5, 48, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(reference.norm_rope(x, norm.weight, rope.rotation), rope(norm(x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows_equals_the_quantization_of_weights(dtype: torch.dtype) -> None:
    x = randn(5, 64, dtype=dtype) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 1e3]).to(dtype)[:, None]
    for code_dtype, expected in ((torch.int8, int8.quantize_rows(x)), (E4M3, quantize_rows_fp8(x))):
        codes, scale = reference.quantize_rows(x, code_dtype)
        assert codes.dtype == code_dtype
        assert torch.equal(codes.float(), expected[0].float())
        assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("code_dtype", [torch.int8, E4M3])
def test_fused_quantization_equals_quantizing_the_result(code_dtype: torch.dtype) -> None:
    x, branch, scale, shift, gate = (randn(2, 5, 48, seed=seed) for seed in range(5))
    residual, modulated = reference.gate_residual_norm_modulate(x, gate, branch, scale, shift)
    for quantized, result in (
        (reference.norm_modulate_quantize(x, scale, shift, code_dtype), reference.norm_modulate(x, scale, shift)),
        (reference.gate_residual_norm_modulate_quantize(x, gate, branch, scale, shift, code_dtype)[1:], modulated),
        (reference.gelu_quantize(x[0], code_dtype), F.gelu(x[0], approximate="tanh")),
    ):
        codes, scales = quantized
        expected = reference.quantize_rows(result, code_dtype)
        assert torch.equal(codes.float(), expected[0].float())
        assert torch.equal(scales, expected[1])
        assert scales.shape == (*result.shape[:-1], 1)
    assert torch.equal(
        reference.gate_residual_norm_modulate_quantize(x, gate, branch, scale, shift, code_dtype)[0], residual
    )


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_matmul_and_rescale_equal_int8_linear_of_the_gelu(dtype: torch.dtype, has_bias: bool) -> None:
    """GELU with quantization, the integer matmul, and scales with bias."""
    x, (weight, scale) = randn(20, 64, dtype=dtype), int8.quantize_rows(randn(48, 64, seed=1))
    bias = randn(48, seed=2).to(dtype) if has_bias else None
    codes, scales = reference.gelu_quantize(x, torch.int8)
    output = reference.rescale(torch._int_mm(codes, weight.t()), scales, scale.flatten(), bias, dtype)
    assert torch.equal(output, int8.linear(F.gelu(x, approximate="tanh"), weight, scale.flatten(), bias))


def test_gelu_quantize_has_the_gelu_of_the_feed_forward() -> None:
    layer = FeedForward(8, 16, 8).requires_grad_(False)
    x = randn(3, 8)
    codes, scales = reference.gelu_quantize(layer.up(x), torch.int8)
    torch.testing.assert_close(layer.down(codes * scales), layer(x), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixel_norm_modulate_silu_equals_a_residual_block(dtype: torch.dtype) -> None:
    x = video(dtype)
    shift, scale = randn(2, 2, 32, seed=1, dtype=dtype).unbind(1)
    normed = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)
    modulated = normed * (1 + scale[..., None, None, None]) + shift[..., None, None, None]
    for output, expected in (
        (reference.pixel_norm_modulate_silu(x), F.silu(normed)),
        (reference.pixel_norm_modulate_silu(x, scale, shift), F.silu(modulated)),
    ):
        assert torch.equal(output, expected)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_residual_equals_a_residual_block(dtype: torch.dtype) -> None:
    x, skip, bias = video(dtype), video(dtype) + 1, randn(32, seed=1, dtype=dtype)
    for bias_or_none, expected in ((None, skip + x), (bias, skip + (x + bias[:, None, None, None]))):
        output = reference.bias_residual(x, bias_or_none, skip)
        assert torch.equal(output, expected)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)


def test_the_definitions_compose_to_a_residual_block() -> None:
    torch.manual_seed(0)
    layer, x = ResnetBlock3D(32, 32, causal=True).requires_grad_(False), video(torch.float32)
    expected, cache = layer(x, TemporalCache.single_chunk()), TemporalCache.single_chunk()
    middle = layer.conv1(reference.pixel_norm_modulate_silu(x), cache)
    bias, layer.conv2.bias = layer.conv2.bias, None
    main = layer.conv2(reference.pixel_norm_modulate_silu(middle), cache)
    torch.testing.assert_close(reference.bias_residual(main, bias, x), expected)
