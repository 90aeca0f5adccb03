"""Every Triton kernel against its definition, on the CPU through Triton's interpreter.

The interpreter must be chosen before triton is imported, and then holds for the whole process: `test_triton` runs this
file in one of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import KernelCase, ModelShape, cases, float32_reference, largest_error, output_tensors
from benchmarks.kernels import to_float32 as to_float32_argument
from kadr.kernels import dequant, fused, reference, trial
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.kernels.triton import adaln, ggml, quantization, rope, vae
from tests.kernels.test_dequant import random_blocks
from tests.kernels.triton_interpreter import enable_all_kernels, round_to_nearest  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn)
CHANNEL_COUNTS = (64, 100, 258)  # a power of two, and two that are not
MODULATION_SCOPES = ("all", "sample", "token")  # what has its own scale, shift and gate
SAMPLES, TOKENS = 2, 3
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half of it, for a value between 1 and 2


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Returns (B, N, D) as a slice of a wider tensor: tokens are three widths apart."""
    return randn(SAMPLES, TOKENS, 3 * width, seed=seed, dtype=dtype)[..., width : 2 * width]


def modulation(width: int, dtype: torch.dtype, scope: str) -> tuple[Tensor, ...]:
    """Returns shift, scale and gate as a layer gets them: rows of one tensor."""
    samples, count = {"all": (1, 1), "sample": (SAMPLES, 1), "token": (SAMPLES, TOKENS)}[scope]
    return randn(samples, count, 6, width, seed=1, dtype=dtype).unbind(-2)[:3]


def video(channels: int, dtype: torch.dtype, seed: int = 0, samples: int = SAMPLES) -> Tensor:
    """Returns (B, C, F, H, W) with contiguous channels."""
    return randn(samples, channels, 3, 2, 5, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def to_float32(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments with their tensors in fp32."""
    return tuple(map(to_float32_argument, arguments))


def assert_rounded_once(output: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Asserts that output is the fp32 result rounded once; sums and exponentials may differ in their last bits."""
    assert (output.dtype, output.shape) == (dtype, expected.shape)
    torch.testing.assert_close(output.float(), expected, rtol=1.01 * ULP[dtype], atol=2e-6)


def assert_codes_close(output: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Asserts equal codes, but for values between two codes, which may be one apart."""
    (codes, scale), (right_codes, right_scale) = output, expected
    assert (codes.dtype, codes.shape) == (right_codes.dtype, right_codes.shape)
    torch.testing.assert_close(scale, right_scale, rtol=2e-6, atol=0)
    difference = (codes.float() - right_codes.float()).abs()
    step = 1 if codes.dtype == torch.int8 else right_codes.float().abs().clamp(min=2**-6) / 8
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 0.005


@pytest.mark.parametrize("scope", MODULATION_SCOPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_norm_modulate_rounds_once(width: int, dtype: torch.dtype, scope: str) -> None:
    shift, scale, _ = modulation(width, dtype, scope)
    arguments = (tokens(width, dtype), scale, shift, 1e-6)
    assert_rounded_once(adaln.norm_modulate(*arguments), reference.norm_modulate(*to_float32(arguments)), dtype)


@pytest.mark.parametrize("code_dtype", EIGHT_BIT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_norm_modulate_quantize_gives_the_definitions_codes(
    width: int, dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    shift, scale, _ = modulation(width, dtype, "sample")
    arguments = (tokens(width, dtype), scale, shift, code_dtype, 1e-6)
    assert_codes_close(
        adaln.norm_modulate_quantize(*arguments), reference.norm_modulate_quantize(*to_float32(arguments))
    )


@pytest.mark.parametrize("scope", [*MODULATION_SCOPES, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_residual_rounds_once(dtype: torch.dtype, scope: str | None) -> None:
    gate = modulation(100, dtype, scope)[2] if scope else None
    arguments = (tokens(100, dtype), gate, tokens(100, dtype, seed=2))
    assert_rounded_once(adaln.gate_residual(*arguments), reference.gate_residual(*to_float32(arguments)), dtype)


@pytest.mark.parametrize("scope", [*MODULATION_SCOPES, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_gate_residual_norm_modulate_rounds_once_or_to_codes(width: int, dtype: torch.dtype, scope: str | None) -> None:
    shift, scale, gate = modulation(width, dtype, scope or "sample")
    x, branch = tokens(width, dtype), tokens(width, dtype, seed=2)
    arguments = (x, gate if scope else None, branch)
    residual, modulated = adaln.gate_residual_norm_modulate(*arguments, scale, shift, 1e-6)
    assert_rounded_once(residual, reference.gate_residual(*to_float32(arguments)), dtype)
    assert_rounded_once(modulated, reference.norm_modulate(*to_float32((residual, scale, shift)), 1e-6), dtype)
    for code_dtype in EIGHT_BIT_DTYPES:
        residual_again, *codes_and_scales = adaln.gate_residual_norm_modulate_quantize(
            *arguments, scale, shift, code_dtype, 1e-6
        )
        assert torch.equal(residual_again, residual)
        assert_codes_close(
            tuple(codes_and_scales),
            reference.norm_modulate_quantize(*to_float32((residual, scale, shift)), code_dtype, 1e-6),
        )


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_norm_rope_rounds_once(width: int, dtype: torch.dtype, samples: int) -> None:
    """The table is random: its pairs need not be a cosine and a sine of one angle."""
    weight, rotation = randn(width, seed=5, dtype=dtype), randn(samples, TOKENS, width // 2, 2, seed=3)
    for arguments in ((rotation, 1e-5, 0.3), (None, 1e-5, 1.0)):
        arguments = (tokens(width, dtype), weight, *arguments)
        assert_rounded_once(rope.norm_rope(*arguments), reference.norm_rope(*to_float32(arguments)), dtype)


@pytest.mark.parametrize("code_dtype", EIGHT_BIT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_quantize_rows_and_gelu_give_the_definitions_codes(
    width: int, dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    x = tokens(width, torch.float32)[0] * torch.tensor([1e-6, 1.0, 300.0])[:, None]
    x[1] = 0
    arguments = (x.to(dtype) if dtype != torch.float16 else tokens(width, dtype)[0], code_dtype)
    assert_codes_close(quantization.quantize_rows(*arguments), reference.quantize_rows(*to_float32(arguments)))
    assert_codes_close(quantization.gelu_quantize(*arguments), reference.gelu_quantize(*to_float32(arguments)))


@pytest.mark.parametrize("code_dtype", EIGHT_BIT_DTYPES)
def test_nan_and_inf_show_in_the_scale_of_their_row_only(code_dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = randn(2, 100)
        x[1, 7] = value
        codes, scale = quantization.quantize_rows(x, code_dtype)
        assert (codes.float() * scale)[0].isfinite().all()
        assert not scale[1].isfinite().all()


def test_gelu_is_correct_for_large_magnitudes() -> None:
    x = torch.tensor([[-1e4, -40.0, -10.0, -0.0, 0.0, 10.0, 40.0, 1e4]])
    codes, scale = quantization.gelu_quantize(x, torch.int8)
    assert (codes * scale)[0, -1] == pytest.approx(1e4)
    assert codes[0, :5].eq(0).all()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sums", [torch.int32, torch.float32, torch.bfloat16])
def test_rescale_rounds_once(sums: torch.dtype, dtype: torch.dtype, has_bias: bool) -> None:
    codes = (randn(3, 1100) * 1e4).to(sums)
    rows, columns = randn(3, 1, seed=1).abs() * 1e-3, randn(1100, seed=2).abs() * 1e-2
    bias = randn(1100, seed=3, dtype=dtype) if has_bias else None
    assert_rounded_once(
        quantization.rescale(codes, rows, columns, bias, dtype),
        reference.rescale(codes, rows, columns, bias, torch.float32),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulation_rows", [0, 1, SAMPLES])
@pytest.mark.parametrize("channels", [64, 100])
def test_pixel_norm_modulate_silu_rounds_once(channels: int, modulation_rows: int, dtype: torch.dtype) -> None:
    scale_shift = (
        randn(modulation_rows, 4, channels, seed=1, dtype=dtype).unbind(1)[:2] if modulation_rows else (None, None)
    )
    for x in (video(channels, dtype), video(channels, dtype)[:, :, 1:], video(2 * channels, dtype)[:, channels:]):
        output = vae.pixel_norm_modulate_silu(x, *scale_shift, 1e-8)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        assert_rounded_once(output, reference.pixel_norm_modulate_silu(*to_float32((x, *scale_shift)), 1e-8), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_bias_residual_rounds_once(has_bias: bool, dtype: torch.dtype) -> None:
    x, bias = video(100, dtype), randn(100, seed=1, dtype=dtype) if has_bias else None
    longer = torch.cat([video(100, dtype, seed=2)] * 2, dim=2).contiguous(memory_format=torch.channels_last_3d)
    for skip in (video(100, dtype, seed=2), longer[:, :, 1:4]):
        output = vae.bias_residual(x, bias, skip)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        assert_rounded_once(output, reference.bias_residual(*to_float32((x, bias, skip))), dtype)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (1, 8, 1, 1, 7), (1, 8, 1, 7, 1), (2, 8, 5, 1, 1), (2, 8, 1, 1, 1)])
def test_axes_of_length_one_do_not_matter(shape: tuple[int, ...]) -> None:
    samples, channels, *sides = shape
    x = randn(samples, 3 * channels, *sides).contiguous(memory_format=torch.channels_last_3d)[
        :, channels : 2 * channels
    ]
    assert_rounded_once(vae.bias_residual(x, None, x), 2 * x, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", fused.GGML_KERNEL_TYPES)
def test_dequantize_equals_its_definition_to_the_bit(name: str, dtype: torch.dtype) -> None:
    ggml_type = GGML_TYPES[name]
    quantized = random_blocks(name, 3, 5)
    expected = dequant.dequantize(quantized, ggml_type, torch.empty(3, 5 * ggml_type.block_size, dtype=dtype))
    buffer = torch.full((4, expected.shape[1] + 32), 7.0, dtype=dtype)
    unaligned = torch.zeros(3, quantized.shape[1] + 1, dtype=torch.uint8)
    unaligned[:, 1:] = quantized
    for blocks in (quantized, unaligned[:, 1:]):  # blocks need not be aligned
        output = ggml.dequantize(blocks, ggml_type, buffer[1:, 32:])
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert torch.equal(output.contiguous().view(bits), expected.view(bits))
        assert (buffer[0] == 7).all()
        assert (buffer[:, :32] == 7).all()


FEW_TOKENS = ModelShape("few", 2, 2048, 32, ((512, 1, 2, 2), (128, 2, 3, 5)), 5)


@pytest.mark.parametrize("case", cases(FEW_TOKENS, "cpu"), ids=lambda case: f"{case.name} {case.note}")
def test_kernels_are_no_less_exact_than_their_definitions(case: KernelCase) -> None:
    """Kernels round once. At the widths of the released models."""
    expected = float32_reference(case)
    reference_error = largest_error(output_tensors(case.reference(*case.arguments)), expected)
    assert largest_error(output_tensors(case.kernel(*case.arguments)), expected) <= reference_error


def test_fused_runs_every_kernel_and_accepts_it() -> None:
    x, (shift, scale, gate) = tokens(64, torch.float32), modulation(64, torch.float32, "sample")
    sums, quantized, video_tensor, code_dtype = (
        randn(3, 64),
        random_blocks("Q8_0", 3, 2),
        video(16, torch.float32),
        torch.int8,
    )
    calls = {
        "norm_modulate": (x, scale, shift),
        "norm_modulate_quantize": (x, scale, shift, code_dtype),
        "gate_residual": (x, gate, x),
        "gate_residual_norm_modulate": (x, gate, x, scale, shift),
        "gate_residual_norm_modulate_quantize": (x, gate, x, scale, shift, code_dtype),
        "norm_rope": (x, shift[0, 0], x.contiguous().unflatten(-1, (-1, 2)), 1e-5, 0.5),
        "quantize_rows": (x[0], code_dtype),
        "gelu_quantize": (x[0], code_dtype),
        "rescale": (sums, sums[:, :1].contiguous(), sums[0], None, torch.float32),
        "pixel_norm_modulate_silu": (video_tensor, shift[:, 0, :16], scale[:, 0, :16]),
        "bias_residual": (video_tensor, shift[0, 0, :16], video_tensor),
        "dequantize": (quantized, GGML_TYPES["Q8_0"], torch.empty(3, 64)),
    }
    defined = {
        name for name, value in vars(reference).items() if getattr(value, "__module__", "") == reference.__name__
    }
    assert calls.keys() == defined - {"rms_norm", "apply_rope"} | {"dequantize"}
    for name, arguments in calls.items():
        getattr(fused, name)(*arguments)
    assert [kernel and kernel.__name__ for kernel in trial._verdicts.values()] == list(calls)
    assert all(kernel.__module__.startswith("kadr.kernels.triton.") for kernel in trial._verdicts.values())
