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
from benchmarks.kernels import to_float32 as in_fp32
from kadr.kernels import dequant, fused, reference, trial
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.kernels.triton import adaln, ggml, quantization, rope, vae
from tests.kernels.test_dequant import any_bytes
from tests.kernels.triton_interpreter import enable_all_kernels, round_to_nearest  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn)
CHANNEL_COUNTS = (64, 100, 258)  # a power of two, and two that are none
MODULATION_SCOPES = ("all", "sample", "token")  # what has a bend of its own
SAMPLES, TOKENS = 2, 3
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a number between 1 and 2, halved


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(B, N, D) as a part of a wider product: neighbours lie apart, and the next token three widths on."""
    return randn(SAMPLES, TOKENS, 3 * width, seed=seed, dtype=dtype)[..., width : 2 * width]


def modulation(width: int, dtype: torch.dtype, scope: str) -> tuple[Tensor, ...]:
    """Shift, scale and gate as a layer gets them: rows of one tensor."""
    samples, count = {"all": (1, 1), "sample": (SAMPLES, 1), "token": (SAMPLES, TOKENS)}[scope]
    return randn(samples, count, 6, width, seed=1, dtype=dtype).unbind(-2)[:3]


def video(channels: int, dtype: torch.dtype, seed: int = 0, samples: int = SAMPLES) -> Tensor:
    """(B, C, F, H, W) with neighbouring channels."""
    return randn(samples, channels, 3, 2, 5, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def to_float32(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in fp32."""
    return tuple(map(in_fp32, arguments))


def assert_rounded_once(output: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """made is what fp32 gives, rounded once; sums and exponentials may differ in their last bits before that."""
    assert (output.dtype, output.shape) == (dtype, expected.shape)
    torch.testing.assert_close(output.float(), expected, rtol=1.01 * ULP[dtype], atol=2e-6)


def assert_codes_close(output: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Codes are the same but where a number lies between two, and then one apart."""
    (codes, scale), (right_codes, right_scale) = output, expected
    assert (codes.dtype, codes.shape) == (right_codes.dtype, right_codes.shape)
    torch.testing.assert_close(scale, right_scale, rtol=2e-6, atol=0)
    off = (codes.float() - right_codes.float()).abs()
    step = 1 if codes.dtype == torch.int8 else right_codes.float().abs().clamp(min=2**-6) / 8
    assert (off <= step).all()
    assert (off > 0).float().mean() < 0.005


@pytest.mark.parametrize("shared", MODULATION_SCOPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_the_entry_of_a_branch(width: int, dtype: torch.dtype, shared: str) -> None:
    shift, scale, _ = modulation(width, dtype, shared)
    given = (tokens(width, dtype), scale, shift, 1e-6)
    assert_rounded_once(adaln.norm_modulate(*given), reference.norm_modulate(*to_float32(given)), dtype)


@pytest.mark.parametrize("kind", EIGHT_BIT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_the_entry_of_a_branch_in_eight_bits(width: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    shift, scale, _ = modulation(width, dtype, "sample")
    given = (tokens(width, dtype), scale, shift, kind, 1e-6)
    assert_codes_close(adaln.norm_modulate_quantize(*given), reference.norm_modulate_quantize(*to_float32(given)))


@pytest.mark.parametrize("shared", [*MODULATION_SCOPES, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_end_of_a_branch(dtype: torch.dtype, shared: str | None) -> None:
    gate = modulation(100, dtype, shared)[2] if shared else None
    given = (tokens(100, dtype), gate, tokens(100, dtype, seed=2))
    assert_rounded_once(adaln.gate_residual(*given), reference.gate_residual(*to_float32(given)), dtype)


@pytest.mark.parametrize("shared", [*MODULATION_SCOPES, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_the_end_of_a_branch_and_the_entry_of_the_next(width: int, dtype: torch.dtype, shared: str | None) -> None:
    shift, scale, gate = modulation(width, dtype, shared or "sample")
    x, branch = tokens(width, dtype), tokens(width, dtype, seed=2)
    given = (x, gate if shared else None, branch)
    ended, entered = adaln.gate_residual_norm_modulate(*given, scale, shift, 1e-6)
    assert_rounded_once(ended, reference.gate_residual(*to_float32(given)), dtype)
    assert_rounded_once(entered, reference.norm_modulate(*to_float32((ended, scale, shift)), 1e-6), dtype)
    for kind in EIGHT_BIT_DTYPES:
        again, *coded = adaln.gate_residual_norm_modulate_quantize(*given, scale, shift, kind, 1e-6)
        assert torch.equal(again, ended)
        assert_codes_close(
            tuple(coded), reference.norm_modulate_quantize(*to_float32((ended, scale, shift)), kind, 1e-6)
        )


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_queries_are_normalised_and_turned(width: int, dtype: torch.dtype, samples: int) -> None:
    """The table is any: neighbours need not share an angle here."""
    table = randn(samples, TOKENS, width, seed=3).cos(), randn(samples, TOKENS, width, seed=4).sin()
    weight = randn(width, seed=5, dtype=dtype)
    given = (tokens(width, dtype), weight, table[0].to(dtype), table[1].to(dtype), 1e-5)
    assert_rounded_once(rope.norm_rope(*given), reference.norm_rope(*to_float32(given)), dtype)


@pytest.mark.parametrize("kind", EIGHT_BIT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNEL_COUNTS)
def test_rows_become_eight_bits(width: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    x = tokens(width, torch.float32)[0] * torch.tensor([1e-6, 1.0, 300.0])[:, None]
    x[1] = 0
    given = (x.to(dtype) if dtype != torch.float16 else tokens(width, dtype)[0], kind)
    assert_codes_close(quantization.quantize_rows(*given), reference.quantize_rows(*to_float32(given)))
    assert_codes_close(quantization.gelu_quantize(*given), reference.gelu_quantize(*to_float32(given)))


@pytest.mark.parametrize("kind", EIGHT_BIT_DTYPES)
def test_a_row_that_holds_no_number_shows_it(kind: torch.dtype) -> None:
    for odd in (torch.nan, torch.inf, -torch.inf):
        x = randn(2, 100)
        x[1, 7] = odd
        codes, scale = quantization.quantize_rows(x, kind)
        assert (codes.float() * scale)[0].isfinite().all()
        assert not scale[1].isfinite().all()


def test_gelu_holds_at_its_ends() -> None:
    x = torch.tensor([[-1e4, -40.0, -10.0, -0.0, 0.0, 10.0, 40.0, 1e4]])
    codes, scale = quantization.gelu_quantize(x, torch.int8)
    assert (codes * scale)[0, -1] == pytest.approx(1e4)
    assert codes[0, :5].eq(0).all()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sums", [torch.int32, torch.float32, torch.bfloat16])
def test_sums_of_codes_become_numbers(sums: torch.dtype, dtype: torch.dtype, biased: bool) -> None:
    codes = (randn(3, 1100) * 1e4).to(sums)
    rows, columns = randn(3, 1, seed=1).abs() * 1e-3, randn(1100, seed=2).abs() * 1e-2
    bias = randn(1100, seed=3, dtype=dtype) if biased else None
    assert_rounded_once(
        quantization.rescale(codes, rows, columns, bias, dtype),
        reference.rescale(codes, rows, columns, bias, torch.float32),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bent", [0, 1, SAMPLES])
@pytest.mark.parametrize("channels", [64, 100])
def test_channels_are_normalised_bent_and_activated(channels: int, bent: int, dtype: torch.dtype) -> None:
    bend = randn(bent, 4, channels, seed=1, dtype=dtype).unbind(1)[:2] if bent else (None, None)
    for x in (video(channels, dtype), video(channels, dtype)[:, :, 1:], video(2 * channels, dtype)[:, channels:]):
        made = vae.pixel_norm_modulate_silu(x, *bend, 1e-8)
        assert made.is_contiguous(memory_format=torch.channels_last_3d)
        assert_rounded_once(made, reference.pixel_norm_modulate_silu(*to_float32((x, *bend)), 1e-8), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_and_a_skip_are_added(biased: bool, dtype: torch.dtype) -> None:
    x, bias = video(100, dtype), randn(100, seed=1, dtype=dtype) if biased else None
    longer = torch.cat([video(100, dtype, seed=2)] * 2, dim=2).contiguous(memory_format=torch.channels_last_3d)
    for skip in (video(100, dtype, seed=2), longer[:, :, 1:4]):
        made = vae.bias_residual(x, bias, skip)
        assert made.is_contiguous(memory_format=torch.channels_last_3d)
        assert_rounded_once(made, reference.bias_residual(*to_float32((x, bias, skip))), dtype)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (1, 8, 1, 1, 7), (1, 8, 1, 7, 1), (2, 8, 5, 1, 1), (2, 8, 1, 1, 1)])
def test_sides_of_one_do_not_matter(shape: tuple[int, ...]) -> None:
    samples, channels, *sides = shape
    x = randn(samples, 3 * channels, *sides).contiguous(memory_format=torch.channels_last_3d)[
        :, channels : 2 * channels
    ]
    assert_rounded_once(vae.bias_residual(x, None, x), 2 * x, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", fused.GGML_KERNEL_TYPES)
def test_blocks_unpack_to_the_bit(name: str, dtype: torch.dtype) -> None:
    packing = GGML_TYPES[name]
    packed = any_bytes(name, 3, 5)
    right = dequant.dequantize(packed, packing, torch.empty(3, 5 * packing.block_size, dtype=dtype))
    buffer = torch.full((4, right.shape[1] + 32), 7.0, dtype=dtype)
    odd = torch.zeros(3, packed.shape[1] + 1, dtype=torch.uint8)
    odd[:, 1:] = packed
    for given in (packed, odd[:, 1:]):  # blocks may begin at an odd byte
        made = ggml.dequantize(given, packing, buffer[1:, 32:])
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert torch.equal(made.contiguous().view(bits), right.view(bits))
        assert (buffer[0] == 7).all()
        assert (buffer[:, :32] == 7).all()


FEW_TOKENS = ModelShape("few", 2, 2048, 32, ((512, 1, 2, 2), (128, 2, 3, 5)), 5)


@pytest.mark.parametrize("case", cases(FEW_TOKENS, "cpu"), ids=lambda case: f"{case.name} {case.note}")
def test_what_the_benchmark_runs_is_more_exact_than_the_definition(case: KernelCase) -> None:
    """Rounded once, and at the widths of the released models."""
    right = float32_reference(case)
    plain = largest_error(output_tensors(case.reference(*case.arguments)), right)
    assert largest_error(output_tensors(case.kernel(*case.arguments)), right) <= plain


def test_the_dispatch_reaches_every_kernel_and_trusts_it() -> None:
    x, (shift, scale, gate) = tokens(64, torch.float32), modulation(64, torch.float32, "sample")
    sums, packed, clip, kind = randn(3, 64), any_bytes("Q8_0", 3, 2), video(16, torch.float32), torch.int8
    calls = {
        "norm_modulate": (x, scale, shift),
        "norm_modulate_quantize": (x, scale, shift, kind),
        "gate_residual": (x, gate, x),
        "gate_residual_norm_modulate": (x, gate, x, scale, shift),
        "gate_residual_norm_modulate_quantize": (x, gate, x, scale, shift, kind),
        "norm_rope": (x, shift[0, 0], x.cos(), x.sin()),
        "quantize_rows": (x[0], kind),
        "gelu_quantize": (x[0], kind),
        "rescale": (sums, sums[:, :1].contiguous(), sums[0], None, torch.float32),
        "pixel_norm_modulate_silu": (clip, shift[:, 0, :16], scale[:, 0, :16]),
        "bias_residual": (clip, shift[0, 0, :16], clip),
        "dequantize": (packed, GGML_TYPES["Q8_0"], torch.empty(3, 64)),
    }
    defined = {
        name for name, value in vars(reference).items() if getattr(value, "__module__", "") == reference.__name__
    }
    assert calls.keys() == defined - {"rms_norm", "apply_rope"} | {"dequantize"}
    for name, arguments in calls.items():
        getattr(fused, name)(*arguments)
    assert [kernel and kernel.__name__ for kernel in trial._verdicts.values()] == list(calls)
    assert all(kernel.__module__.startswith("kadr.kernels.triton.") for kernel in trial._verdicts.values())
