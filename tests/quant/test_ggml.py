"""Numbers into GGML's blocks: the simple formats byte for byte as gguf, the K formats no worse than llama.cpp."""

from __future__ import annotations

import gguf
import pytest
import torch

from kadr.kernels.dequant import dequantize
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.quant import ggml
from kadr.quant.ggml import quantize

SIMPLE = [name for name in GGML_TYPES if not name.endswith("K")]
# On `normal()`: the error relative to the weight (root mean squares), and that of llama.cpp's reference quantizers
# (quantize_row_*_ref of ggml at v0.21.0, compiled; the gguf package has none).
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
K = {name: theirs for name, (_, theirs) in ERRORS.items() if theirs is not None}
# Numbers in a group; the largest code; the largest scale; and whether groups have an offset.
SHAPES = {
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


def normal(rows: int = 64, columns: int = 1024, scale: float = 0.02) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def back(packed: torch.Tensor, name: str) -> torch.Tensor:
    """As gguf reads it; kadr reads the same."""
    right = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(dequantize(packed, GGML_TYPES[name], torch.empty_like(right)), right)
    return right


def error(made: torch.Tensor, weight: torch.Tensor) -> float:
    return float((made - weight).norm() / weight.norm())


def naive(weight: torch.Tensor, name: str) -> torch.Tensor:
    """What the format gives without a search: each group spanned, its scale and offset rounded, its numbers rounded."""
    size, top, top_scale, offset = SHAPES[name]
    x = weight.reshape(-1, 256 // size, size)
    if offset:
        lowest = x.amin(-1, keepdim=True).clamp(max=0)
        factor = lowest.amin(1, keepdim=True).clamp(max=-1e-9) / top_scale
        lowest = (lowest / factor).round() * factor
        scale = (x.amax(-1, keepdim=True) - lowest) / top
        bounds = (0, top)
    else:
        lowest, bounds = torch.zeros(()), (-top, top - 1)
        scale = x.abs().amax(-1, keepdim=True) / top
    factor = scale.amax(1, keepdim=True) / top_scale
    scale = (scale / factor).round() * factor
    return (((x - lowest) / scale).round().clamp(*bounds) * scale + lowest).view_as(weight)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIMPLE)
def test_the_bytes_of_a_simple_format_are_those_of_gguf(name: str, dtype: torch.dtype, spread: str) -> None:
    """In bf16 numbers of the same magnitude and opposite signs are common, and which one is taken shows."""
    weight = SPREADS[spread](normal(33, 512)).to(dtype)
    right = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(quantize(weight, GGML_TYPES[name]), torch.from_numpy(right))


@pytest.mark.parametrize("name", SIMPLE)
def test_halves_are_rounded_as_gguf_does(name: str) -> None:
    weight = (torch.arange(-254, 258) / 2).view(-1, 32)
    right = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(quantize(weight, GGML_TYPES[name]), torch.from_numpy(right))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_error_on_normal_numbers_is_the_one_measured(name: str) -> None:
    made = error(back(quantize(normal(), GGML_TYPES[name]), name), normal())
    assert made == pytest.approx(ERRORS[name][0], rel=0.02)


@pytest.mark.parametrize("name", K)
def test_a_k_format_is_no_worse_than_llama_cpp_makes_it(name: str) -> None:
    assert error(back(quantize(normal(), GGML_TYPES[name]), name), normal()) <= 1.002 * K[name]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", K)
def test_the_search_is_better_than_spanning_the_numbers(name: str, spread: str) -> None:
    weight = SPREADS[spread](normal(16))
    assert error(back(quantize(weight, GGML_TYPES[name]), name), weight) < error(naive(weight, name), weight)


@pytest.mark.parametrize("name", K)
def test_small_numbers_are_rounded_as_well_as_large_ones(name: str) -> None:
    """The factors of their scales are where float16 has few digits: there llama.cpp's Q6_K is off by 12 %."""
    weight = normal(scale=1e-4)
    assert error(back(quantize(weight, GGML_TYPES[name]), name), weight) <= 1.03 * ERRORS[name][0]


@pytest.mark.parametrize("name", GGML_TYPES)
def test_what_was_rounded_stays_where_it_is(name: str) -> None:
    once = back(quantize(normal(16), GGML_TYPES[name]), name)
    twice = back(quantize(once, GGML_TYPES[name]), name)
    assert error(twice, once) < 0.2 * ERRORS[name][0]


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_0"])
def test_around_zero_what_was_rounded_gives_the_same_bytes(name: str) -> None:
    packed = quantize(normal(16), GGML_TYPES[name])
    assert torch.equal(quantize(back(packed, name), GGML_TYPES[name]), packed)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_zeros_stay_zeros_beside_other_blocks_and_in_them(name: str) -> None:
    weight = normal(3, 1024)
    weight[0] = 0
    weight[1, :512] = 0
    weight[2, 64:96] = 0
    made = back(quantize(weight, GGML_TYPES[name]), name)
    assert not made[0].any()
    assert not made[1, :512].any()
    assert made[2, 64:96].abs().max() < 0.01  # an offset may be left
    assert error(made, weight) < 1.2 * ERRORS[name][0]


@pytest.mark.parametrize("value", [0.3, -0.3, 1.0, -60_000.0])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_constant_is_kept(name: str, value: float) -> None:
    made = back(quantize(torch.full((2, 256), value), GGML_TYPES[name]), name)
    torch.testing.assert_close(made, torch.full((2, 256), value), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-8, 1e-6])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_tiny_numbers_lose_no_more_than_the_smallest_steps(name: str, scale: float) -> None:
    weight = normal(4, 512).clamp(-0.06, 0.06) / 0.06 * scale
    made = back(quantize(weight, GGML_TYPES[name]), name)
    assert (made - weight).abs().max() <= max(scale, 2.0**-23)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_huge_numbers_are_rounded_like_others(name: str) -> None:
    weight = normal(4, 512).clamp(-0.06, 0.06) * 1e6
    made = back(quantize(weight, GGML_TYPES[name]), name)
    assert weight.abs().max() == 60_000
    assert error(made, weight) < 1.1 * ERRORS[name][0]


@pytest.mark.parametrize("name", GGML_TYPES)
def test_numbers_whose_scale_is_beyond_float16_are_refused(name: str) -> None:
    weight = normal(4, 512)
    weight[3, 300] = 1e9
    with pytest.raises(ValueError, match="does not fit into float16"):
        quantize(weight, GGML_TYPES[name])


@pytest.mark.parametrize("value, what", [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_what_is_no_number_is_refused_by_name(name: str, value: float, what: str) -> None:
    weight = normal(4, 512).bfloat16()
    weight[2, 100] = value
    with pytest.raises(ValueError, match=what):
        quantize(weight, GGML_TYPES[name])


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_row_of_half_a_block_is_refused(name: str) -> None:
    packing = GGML_TYPES[name]
    with pytest.raises(ValueError, match=f"does not divide into {name} blocks"):
        quantize(torch.zeros(2, packing.block_size * 3 // 2), packing)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_pieces_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(5, 512)
    whole = quantize(weight, GGML_TYPES[name])
    for piece in (1, 1024):  # a row at a time, and two with one left over
        monkeypatch.setattr(ggml, "GGML_SLICE_ELEMENTS", piece)
        assert torch.equal(quantize(weight, GGML_TYPES[name]), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_weight_of_any_float_dtype_is_taken(name: str, dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(normal(2, 512).to(dtype))
    assert torch.equal(quantize(weight, GGML_TYPES[name]), quantize(weight.detach().float(), GGML_TYPES[name]))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_weight_is_only_read(name: str) -> None:
    """One block is a case of its own: as a matrix it is contiguous whichever way it is turned."""
    weight = normal(1, GGML_TYPES[name].block_size)
    kept = weight.clone()
    quantize(weight, GGML_TYPES[name])
    assert torch.equal(weight, kept)


def test_no_rows_make_no_bytes() -> None:
    assert quantize(torch.empty(0, 512), GGML_TYPES["Q4_K"]).shape == (0, 288)
