"""Weights stored otherwise: what is changed, what is not, and what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kadr.errors import CheckpointError, RequestError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.quant.convert import ggml_type_for, linears_in_blocks, quantize_blocks
from kadr.quant.layers import Fp8Linear, GGMLLinear, ScaledLinear, Scratch, W8A8Linear
from kadr.quant.rotation import detect_and_undo_rotation, noise_correlation, rotate_weights
from kadr.quant.weight_formats import (
    BITS_PER_WEIGHT,
    FP8,
    FP8_WEIGHT_ONLY,
    INT8,
    INT8_WEIGHT_ONLY,
    WEIGHT_FORMATS,
    check_weight_format,
)
from tests.tiny_models import build_random

CPU = torch.device("cpu")
CONFIG = TransformerConfig(num_layers=2, num_heads=4, head_dim=64, caption_channels=32, in_channels=8)
QUANTIZED = (W8A8Linear, GGMLLinear, ScaledLinear)
# The largest error of the answer, relative, that each way may make with these weights; measured, and a fifth more.
BOUNDS = {
    INT8: 0.016,
    INT8_WEIGHT_ONLY: 0.011,
    FP8: 0.06,
    FP8_WEIGHT_ONLY: 0.035,
    "Q8_0": 0.008,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q4_K": 0.12,
}


def made() -> Transformer:
    return build_random(lambda: Transformer(CONFIG))


def answer(transformer: Transformer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens, text = (torch.randn(1, n, c, generator=generator).to(dtype) for n, c in ((12, 8), (5, 32)))
    rope = transformer.compute_rope(torch.rand(1, 3, 12, generator=generator) * 40)
    with torch.no_grad():
        return transformer(tokens, rope, text, None, torch.tensor([[0.7]])).float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("scheme", BOUNDS)
def test_each_scheme_answers_nearly_as_the_plain_model(scheme: str) -> None:
    right, transformer = answer(made()), made()
    quantize_blocks(transformer, scheme, device=CPU)
    assert 0 < apart(answer(transformer), right) < BOUNDS[scheme]


@pytest.mark.parametrize("scheme", [name for name in WEIGHT_FORMATS if name in BITS_PER_WEIGHT])
def test_only_the_matrices_of_the_blocks_change_and_take_the_bits_they_should(scheme: str) -> None:
    plain, transformer = made(), made()
    linears = {name: linear.weight.numel() for name, linear in linears_in_blocks(plain)}
    assert len(linears) == 20
    quantize_blocks(transformer, scheme, device=CPU)
    changed = {name for name, child in transformer.named_modules() if isinstance(child, QUANTIZED)}
    assert changed == linears.keys()
    stored = sum(
        tensor.nbytes
        for name in changed
        for own, tensor in transformer.get_submodule(name).named_buffers()
        if own != "bias"
    )
    by_row = 0 if scheme in GGML_TYPES else 4 * sum(linear.weight.shape[0] for _, linear in linears_in_blocks(plain))
    assert stored * 8 == BITS_PER_WEIGHT[scheme] * sum(linears.values()) + 8 * by_row
    weights = {f"{name}.weight" for name in changed}
    before, after = plain.state_dict(), transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in weights)


def test_unpacking_shares_one_buffer_and_equals_the_unpacked_weight() -> None:
    transformer = made()
    quantize_blocks(transformer, "Q8_0", device=CPU)
    layers = [child for child in transformer.modules() if isinstance(child, GGMLLinear)]
    assert len({id(layer.scratch) for layer in layers}) == 1
    x = torch.randn(3, layers[0].in_features)
    weight = torch.empty(layers[0].out_features, layers[0].in_features)
    layers[0].dequantize_into(weight)
    assert torch.equal(layers[0](x), nn.functional.linear(x, weight, layers[0].bias))


def test_the_scratch_buffer_grows_to_the_largest_weight_and_is_used_again() -> None:
    scratch, like = Scratch(), torch.empty(0)
    small = scratch.get_buffer(3, 4, like)
    large = scratch.get_buffer(8, 8, like)
    assert large.shape == (8, 8)
    assert scratch.get_buffer(3, 4, like).data_ptr() == large.data_ptr() != small.data_ptr()
    assert scratch.get_buffer(2, 2, torch.empty(0, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("first, second", [(FP8, FP8), ("Q8_0", INT8), (INT8, "Q4_K")])
def test_what_is_quantized_is_not_quantized_again(first: str, second: str) -> None:
    transformer = made()
    quantize_blocks(transformer, first, device=CPU)
    with pytest.raises(CheckpointError, match=r"blocks\.0\..*would lose twice.*Leave --quant out"):
        quantize_blocks(transformer, second, device=CPU)


@pytest.mark.parametrize("by_row", [True, False])
def test_weights_in_8_bit_floats_are_multiplied_as_they_are_stored(by_row: bool) -> None:
    transformer = made()
    quantize_blocks(transformer, FP8_WEIGHT_ONLY, device=CPU)
    stored = {name: child for name, child in transformer.named_modules() if isinstance(child, ScaledLinear)}
    for child in stored.values():
        child.scale = child.scale if by_row else None
    right = answer(transformer)
    quantize_blocks(transformer, FP8, device=CPU)
    for name, before in stored.items():
        now = transformer.get_submodule(name)
        assert isinstance(now, Fp8Linear)
        assert torch.equal(now.weight.float(), before.weight.float())
        assert torch.equal(now.scale[:, None], torch.ones(len(now.weight), 1) if before.scale is None else before.scale)
    assert len(stored) == 20
    assert 0 < apart(answer(transformer), right) < BOUNDS[FP8]


def test_turned_weights_are_multiplied_as_before() -> None:
    transformer = made()
    quantize_blocks(transformer, FP8_WEIGHT_ONLY, device=CPU)
    assert rotate_weights(transformer, 64)
    right = answer(transformer)
    quantize_blocks(transformer, FP8, device=CPU)
    assert not [child for child in transformer.modules() if isinstance(child, Fp8Linear)]
    assert torch.equal(answer(transformer), right)


def test_a_layer_of_other_sides_than_gpus_multiply_is_stored_alone() -> None:
    transformer = build_random(
        lambda: Transformer(TransformerConfig(num_layers=1, num_heads=3, head_dim=8, caption_channels=8, in_channels=8))
    )
    quantize_blocks(transformer, FP8, device=CPU)
    assert isinstance(transformer.blocks[0].self_attention.q, ScaledLinear)  # 24 x 24


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", [INT8, FP8, "Q4_K"])
def test_a_weight_that_is_not_finite_is_named(scheme: str, value: float) -> None:
    transformer = made()
    transformer.blocks[1].feed_forward.up.weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"blocks\.1\.feed_forward\.up cannot be stored as .*not finite"):
        quantize_blocks(transformer, scheme, device=CPU)


def test_each_weight_is_let_go_of_when_it_is_done() -> None:
    transformer = made()
    weights = [linear.weight for _, linear in linears_in_blocks(transformer)]
    gone: list[int] = []
    quantize_blocks(transformer, INT8, device=CPU, release=lambda tensors: gone.extend(t.data_ptr() for t in tensors))
    assert gone == [weight.data_ptr() for weight in weights]


def test_rows_that_are_no_whole_blocks_fall_back_as_llama_cpp_does() -> None:
    assert [ggml_type_for(name, 192).name for name in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q8_0")] == [
        "Q8_0", "Q5_1", "Q5_0", "Q4_0", "Q4_0", "Q8_0",
    ]  # fmt: skip
    assert ggml_type_for("Q4_K", 512).name == "Q4_K"
    with pytest.raises(CheckpointError, match=r"rows of 40 elements.*int8-weights or fp8"):
        ggml_type_for("Q4_K", 40)


def test_names_of_schemes_are_known_in_any_case_and_others_refused() -> None:
    assert check_weight_format("q4_k") == "Q4_K"
    assert check_weight_format("INT8") == INT8
    with pytest.raises(RequestError, match=r"quant is 'int4'; it must be one of none, auto, int8"):
        check_weight_format("int4")


# Turned weights


def drawn() -> torch.Tensor:
    return torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(9))


def test_the_likeness_of_an_answer_to_its_noise() -> None:
    noise = drawn()
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(10))
    assert noise_correlation(lambda x: 3 * x + 1, noise) == pytest.approx(1.0)
    assert noise_correlation(lambda x: -x, noise) == pytest.approx(-1.0)
    assert abs(noise_correlation(lambda x: other, noise)) < 0.3
    assert noise_correlation(lambda x: x * float("nan"), noise) == noise_correlation(torch.zeros_like, noise) == 0.0


class Through(nn.Module):
    """Two matrices that undo each other, inside a block: it answers with what it is given, unless they are turned."""

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))[0]
        self.blocks = nn.ModuleList([ScaledLinear(m, None, None, Scratch()) for m in (matrix, matrix.T.contiguous())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.blocks:
            x = torch.tanh(layer(x))
        return x


def turned_and_stored(module: Through, size: int) -> None:
    from kadr.kernels.hadamard import hadamard_transform

    for layer in module.blocks:
        layer.weight = hadamard_transform(layer.weight, size)


@pytest.mark.parametrize("size, found", [(None, None), (64, 0)])
def test_turned_weights_are_found_and_turned_back(size: int | None, found: int | None) -> None:
    module, noise = Through(), torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(4)) / 4
    right = module(noise)
    if size is not None:
        turned_and_stored(module, size)
        assert noise_correlation(module, noise) < 0.5
    assert detect_and_undo_rotation(module, module, noise) == found
    torch.testing.assert_close(module(noise), right, rtol=1e-3, atol=1e-4)


def test_weights_that_answer_in_no_way_are_refused() -> None:
    module, noise = Through(), torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(4))
    module.blocks[0].weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(8))
    with pytest.raises(ValueError, match=r"^-?0\.\d\d$"):
        detect_and_undo_rotation(module, module, noise)
    assert all(layer.rotation_size is None for layer in module.blocks)


def test_turning_plain_weights_twice_gives_them_back() -> None:
    transformer, right = made(), answer(made())
    assert rotate_weights(transformer, 64)
    assert apart(answer(transformer), right) > 0.1
    assert rotate_weights(transformer, 64)
    assert apart(answer(transformer), right) < 1e-4
    assert not rotate_weights(transformer, 512)  # wider than a row
