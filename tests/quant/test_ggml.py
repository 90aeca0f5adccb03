"""Quantizing to GGML's blocks: simple formats equal gguf byte for byte, K formats are no worse than llama.cpp."""

from __future__ import annotations

import gguf
import pytest
import torch

from kadr.kernels.dequant import dequantize
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.quant import ggml
from kadr.quant.ggml import quantize

SIMPLE_FORMATS = [name for name in GGML_TYPES if not name.endswith("K")]
# On `normal_weight()`: the error relative to the weight (root mean squares), and that of llama.cpp's reference
# quantizers (quantize_row_*_ref of ggml at v0.21.0, compiled; the gguf package has none).
ERRORS = {
    "Q8_0": (0.00533, None),
    "Q6_K": (0.01734, 0.01771),
    "Q5_K": (0.03548, 0.03601),
    "Q5_1": (0.03783, None),
    "Q5_0": (0.04268, None),
    "Q4_K": (0.07151, 0.07155),
    "Q4_1": (0.07827, None),
    "Q4_0": (0.08565, None),
    "Q3_K": (0.14483, 0.15042),
    "Q2_K": (0.27303, 0.29724),
}
LLAMA_CPP_ERRORS = {
    name: llama_cpp_error for name, (_, llama_cpp_error) in ERRORS.items() if llama_cpp_error is not None
}
# Group size, largest code, largest scale, and whether groups have an offset.
K_FORMATS = {
    "Q6_K": (16, 32, 128, False),
    "Q5_K": (32, 31, 63, True),
    "Q4_K": (32, 15, 63, True),
    "Q3_K": (16, 4, 32, False),
    "Q2_K": (16, 3, 15, True),
}
SPREADS = {
    "narrow": lambda x: x,
    "long-tailed": lambda x: x * x.abs().square(),
    "lopsided": lambda x: x + 0.05,
    "negative": lambda x: x.abs().neg(),
}


def normal_weight(rows: int = 64, columns: int = 1024, scale: float = 0.02) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def dequantize_by_gguf(quantized: torch.Tensor, name: str) -> torch.Tensor:
    """Dequantizes with gguf, and asserts that kadr gives the same."""
    expected = torch.from_numpy(gguf.quants.dequantize(quantized.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(dequantize(quantized, GGML_TYPES[name], torch.empty_like(expected)), expected)
    return expected


def relative_error(dequantized: torch.Tensor, weight: torch.Tensor) -> float:
    return float((dequantized - weight).norm() / weight.norm())


def spanned(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Quantizes without a search: the codes span each group, then scale, offset and values are rounded."""
    group_size, max_code, max_scale, has_offset = K_FORMATS[name]
    x = weight.reshape(-1, 256 // group_size, group_size)
    if has_offset:
        lowest = x.amin(-1, keepdim=True).clamp(max=0)
        factor = lowest.amin(1, keepdim=True).clamp(max=-1e-9) / max_scale
        lowest = (lowest / factor).round() * factor
        scale = (x.amax(-1, keepdim=True) - lowest) / max_code
        bounds = (0, max_code)
    else:
        lowest, bounds = torch.zeros(()), (-max_code, max_code - 1)
        scale = x.abs().amax(-1, keepdim=True) / max_code
    factor = scale.amax(1, keepdim=True) / max_scale
    scale = (scale / factor).round() * factor
    return (((x - lowest) / scale).round().clamp(*bounds) * scale + lowest).view_as(weight)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIMPLE_FORMATS)
def test_bytes_of_simple_formats_equal_those_of_gguf(name: str, dtype: torch.dtype, spread: str) -> None:
    """In bf16, values of equal magnitude and opposite signs are common, and the choice between them shows."""
    weight = SPREADS[spread](normal_weight(33, 512)).to(dtype)
    expected = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(quantize(weight, GGML_TYPES[name]), torch.from_numpy(expected))


@pytest.mark.parametrize("name", SIMPLE_FORMATS)
def test_ties_are_rounded_as_in_gguf(name: str) -> None:
    weight = (torch.arange(-254, 258) / 2).view(-1, 32)
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(quantize(weight, GGML_TYPES[name]), torch.from_numpy(expected))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_error_on_normal_values_is_as_measured(name: str) -> None:
    dequantized = relative_error(dequantize_by_gguf(quantize(normal_weight(), GGML_TYPES[name]), name), normal_weight())
    assert dequantized == pytest.approx(ERRORS[name][0], rel=0.02)


@pytest.mark.parametrize("name", LLAMA_CPP_ERRORS)
def test_k_formats_are_no_worse_than_llama_cpps(name: str) -> None:
    assert (
        relative_error(dequantize_by_gguf(quantize(normal_weight(), GGML_TYPES[name]), name), normal_weight())
        <= 1.002 * LLAMA_CPP_ERRORS[name]
    )


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", LLAMA_CPP_ERRORS)
def test_the_search_is_better_than_spanning_each_group(name: str, spread: str) -> None:
    weight = SPREADS[spread](normal_weight(16))
    assert relative_error(dequantize_by_gguf(quantize(weight, GGML_TYPES[name]), name), weight) < relative_error(
        spanned(weight, name), weight
    )


@pytest.mark.parametrize("name", LLAMA_CPP_ERRORS)
def test_small_values_have_the_relative_error_of_large_ones(name: str) -> None:
    """The factors of their scales are float16 subnormals, for which llama.cpp's Q6_K is off by 12 %."""
    weight = normal_weight(scale=1e-4)
    assert (
        relative_error(dequantize_by_gguf(quantize(weight, GGML_TYPES[name]), name), weight) <= 1.03 * ERRORS[name][0]
    )


@pytest.mark.parametrize("name", GGML_TYPES)
def test_quantizing_twice_changes_little(name: str) -> None:
    once = dequantize_by_gguf(quantize(normal_weight(16), GGML_TYPES[name]), name)
    twice = dequantize_by_gguf(quantize(once, GGML_TYPES[name]), name)
    assert relative_error(twice, once) < 0.2 * ERRORS[name][0]


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_0"])
def test_symmetric_formats_are_idempotent(name: str) -> None:
    quantized = quantize(normal_weight(16), GGML_TYPES[name])
    assert torch.equal(quantize(dequantize_by_gguf(quantized, name), GGML_TYPES[name]), quantized)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_zero_rows_and_blocks_stay_zero(name: str) -> None:
    weight = normal_weight(3, 1024)
    weight[0] = 0
    weight[1, :512] = 0
    weight[2, 64:96] = 0
    dequantized = dequantize_by_gguf(quantize(weight, GGML_TYPES[name]), name)
    assert not dequantized[0].any()
    assert not dequantized[1, :512].any()
    assert dequantized[2, 64:96].abs().max() < 0.01  # an offset may remain
    assert relative_error(dequantized, weight) < 1.2 * ERRORS[name][0]


@pytest.mark.parametrize("value", [0.3, -0.3, 1.0, -60_000.0])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_constant_is_reproduced(name: str, value: float) -> None:
    dequantized = dequantize_by_gguf(quantize(torch.full((2, 256), value), GGML_TYPES[name]), name)
    torch.testing.assert_close(dequantized, torch.full((2, 256), value), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-8, 1e-6])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_tiny_values_are_off_by_at_most_the_smallest_step(name: str, scale: float) -> None:
    weight = normal_weight(4, 512).clamp(-0.06, 0.06) / 0.06 * scale
    dequantized = dequantize_by_gguf(quantize(weight, GGML_TYPES[name]), name)
    assert (dequantized - weight).abs().max() <= max(scale, 2.0**-23)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_huge_values_have_the_usual_relative_error(name: str) -> None:
    weight = normal_weight(4, 512).clamp(-0.06, 0.06) * 1e6
    dequantized = dequantize_by_gguf(quantize(weight, GGML_TYPES[name]), name)
    assert weight.abs().max() == 60_000
    assert relative_error(dequantized, weight) < 1.1 * ERRORS[name][0]


@pytest.mark.parametrize("name", GGML_TYPES)
def test_values_whose_scale_overflows_float16_are_refused(name: str) -> None:
    weight = normal_weight(4, 512)
    weight[3, 300] = 1e9
    with pytest.raises(ValueError, match="does not fit into float16"):
        quantize(weight, GGML_TYPES[name])


@pytest.mark.parametrize("value, message", [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_nan_and_inf_are_refused_by_name(name: str, value: float, message: str) -> None:
    weight = normal_weight(4, 512).bfloat16()
    weight[2, 100] = value
    with pytest.raises(ValueError, match=message):
        quantize(weight, GGML_TYPES[name])


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_row_of_half_a_block_is_refused(name: str) -> None:
    ggml_type = GGML_TYPES[name]
    with pytest.raises(ValueError, match=f"does not divide into {name} blocks"):
        quantize(torch.zeros(2, ggml_type.block_size * 3 // 2), ggml_type)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_slice_size_does_not_change_the_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal_weight(5, 512)
    whole = quantize(weight, GGML_TYPES[name])
    for slice_elements in (1, 1024):  # one row at a time; two with a remainder of one
        monkeypatch.setattr(ggml, "GGML_SLICE_ELEMENTS", slice_elements)
        assert torch.equal(quantize(weight, GGML_TYPES[name]), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_weight_of_any_float_dtype_is_quantized(name: str, dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(normal_weight(2, 512).to(dtype))
    assert torch.equal(quantize(weight, GGML_TYPES[name]), quantize(weight.detach().float(), GGML_TYPES[name]))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_weight_is_not_written(name: str) -> None:
    """A single block is a special case: it is contiguous transposed too."""
    weight = normal_weight(1, GGML_TYPES[name].block_size)
    original = weight.clone()
    quantize(weight, GGML_TYPES[name])
    assert torch.equal(weight, original)


def test_no_rows_quantize_to_no_bytes() -> None:
    assert quantize(torch.empty(0, 512), GGML_TYPES["Q4_K"]).shape == (0, 288)
