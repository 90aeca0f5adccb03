"""Quantizing finished modules: which weights change, which do not, and with what error."""

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
# Largest relative error of the prediction for each weight format; measured, and a fifth more.
MAX_ERRORS = {
    INT8: 0.016,
    INT8_WEIGHT_ONLY: 0.011,
    FP8: 0.06,
    FP8_WEIGHT_ONLY: 0.035,
    "Q8_0": 0.008,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q4_K": 0.12,
}


def build_transformer() -> Transformer:
    return build_random(lambda: Transformer(CONFIG))


def predict(transformer: Transformer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens, text = (torch.randn(1, n, c, generator=generator).to(dtype) for n, c in ((12, 8), (5, 32)))
    rope = transformer.compute_rope(torch.rand(1, 3, 12, generator=generator) * 40)
    with torch.no_grad():
        return transformer(tokens, rope, text, None, torch.tensor([[0.7]])).float()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("weight_format", MAX_ERRORS)
def test_quantization_error_is_bounded_for_each_weight_format(weight_format: str) -> None:
    expected, transformer = predict(build_transformer()), build_transformer()
    quantize_blocks(transformer, weight_format, device=CPU)
    assert 0 < relative_error(predict(transformer), expected) < MAX_ERRORS[weight_format]


@pytest.mark.parametrize("weight_format", [name for name in WEIGHT_FORMATS if name in BITS_PER_WEIGHT])
def test_only_linears_in_blocks_change_and_take_the_stated_bits(weight_format: str) -> None:
    plain, transformer = build_transformer(), build_transformer()
    linears = {name: linear.weight.numel() for name, linear in linears_in_blocks(plain)}
    assert len(linears) == 20
    quantize_blocks(transformer, weight_format, device=CPU)
    changed = {name for name, child in transformer.named_modules() if isinstance(child, QUANTIZED)}
    assert changed == linears.keys()
    stored_bytes = sum(
        tensor.nbytes
        for name in changed
        for buffer_name, tensor in transformer.get_submodule(name).named_buffers()
        if buffer_name != "bias"
    )
    scale_bytes = (
        0 if weight_format in GGML_TYPES else 4 * sum(linear.weight.shape[0] for _, linear in linears_in_blocks(plain))
    )
    assert stored_bytes * 8 == BITS_PER_WEIGHT[weight_format] * sum(linears.values()) + 8 * scale_bytes
    weights = {f"{name}.weight" for name in changed}
    stored_layer, after = plain.state_dict(), transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in stored_layer.items() if name not in weights)


def test_ggml_layers_share_a_scratch_and_use_the_dequantized_weight() -> None:
    transformer = build_transformer()
    quantize_blocks(transformer, "Q8_0", device=CPU)
    layers = [child for child in transformer.modules() if isinstance(child, GGMLLinear)]
    assert len({id(layer.scratch) for layer in layers}) == 1
    x = torch.randn(3, layers[0].in_features)
    weight = torch.empty(layers[0].out_features, layers[0].in_features)
    layers[0].dequantize_into(weight)
    assert torch.equal(layers[0](x), nn.functional.linear(x, weight, layers[0].bias))


def test_the_scratch_buffer_grows_and_is_reused() -> None:
    scratch, like = Scratch(), torch.empty(0)
    small = scratch.get_buffer(3, 4, like)
    large = scratch.get_buffer(8, 8, like)
    assert large.shape == (8, 8)
    assert scratch.get_buffer(3, 4, like).data_ptr() == large.data_ptr() != small.data_ptr()
    assert scratch.get_buffer(2, 2, torch.empty(0, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("first, second", [(FP8, FP8), ("Q8_0", INT8), (INT8, "Q4_K")])
def test_quantizing_a_quantized_module_is_refused(first: str, second: str) -> None:
    transformer = build_transformer()
    quantize_blocks(transformer, first, device=CPU)
    with pytest.raises(CheckpointError, match=r"blocks\.0\..*would lose twice.*Leave quant out"):
        quantize_blocks(transformer, second, device=CPU)


@pytest.mark.parametrize("has_row_scales", [True, False])
def test_fp8_keeps_the_codes_of_stored_fp8_weights(has_row_scales: bool) -> None:
    transformer = build_transformer()
    quantize_blocks(transformer, FP8_WEIGHT_ONLY, device=CPU)
    stored_layers = {name: child for name, child in transformer.named_modules() if isinstance(child, ScaledLinear)}
    for child in stored_layers.values():
        child.scale = child.scale if has_row_scales else None
    expected = predict(transformer)
    quantize_blocks(transformer, FP8, device=CPU)
    for name, stored_layer in stored_layers.items():
        layer = transformer.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        assert torch.equal(layer.weight.float(), stored_layer.weight.float())
        assert torch.equal(
            layer.scale[:, None], torch.ones(len(layer.weight), 1) if stored_layer.scale is None else stored_layer.scale
        )
    assert len(stored_layers) == 20
    assert 0 < relative_error(predict(transformer), expected) < MAX_ERRORS[FP8]


def test_fp8_leaves_hadamard_rotated_weights_as_they_are() -> None:
    transformer = build_transformer()
    quantize_blocks(transformer, FP8_WEIGHT_ONLY, device=CPU)
    assert rotate_weights(transformer, 64)
    expected = predict(transformer)
    quantize_blocks(transformer, FP8, device=CPU)
    assert not [child for child in transformer.modules() if isinstance(child, Fp8Linear)]
    assert torch.equal(predict(transformer), expected)


def test_a_shape_without_fp8_matmul_is_stored_weight_only() -> None:
    transformer = build_random(
        lambda: Transformer(TransformerConfig(num_layers=1, num_heads=3, head_dim=8, caption_channels=8, in_channels=8))
    )
    quantize_blocks(transformer, FP8, device=CPU)
    assert isinstance(transformer.blocks[0].self_attention.q, ScaledLinear)  # 24 x 24


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_format", [INT8, FP8, "Q4_K"])
def test_a_weight_that_is_not_finite_is_refused_by_name(weight_format: str, value: float) -> None:
    transformer = build_transformer()
    transformer.blocks[1].feed_forward.up.weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"blocks\.1\.feed_forward\.up cannot be stored as .*not finite"):
        quantize_blocks(transformer, weight_format, device=CPU)


def test_each_replaced_weight_is_released() -> None:
    transformer = build_transformer()
    weights = [linear.weight for _, linear in linears_in_blocks(transformer)]
    released: list[int] = []
    quantize_blocks(
        transformer, INT8, device=CPU, release=lambda tensors: released.extend(t.data_ptr() for t in tensors)
    )
    assert released == [weight.data_ptr() for weight in weights]


def test_rows_that_do_not_fill_blocks_fall_back_as_in_llama_cpp() -> None:
    assert [ggml_type_for(name, 192).name for name in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q8_0")] == [
        "Q8_0", "Q5_1", "Q5_0", "Q4_0", "Q4_0", "Q8_0",
    ]  # fmt: skip
    assert ggml_type_for("Q4_K", 512).name == "Q4_K"
    with pytest.raises(CheckpointError, match=r"rows of 40 elements.*int8-weights or fp8"):
        ggml_type_for("Q4_K", 40)


def test_weight_format_names_ignore_case_and_others_are_refused() -> None:
    assert check_weight_format("q4_k") == "Q4_K"
    assert check_weight_format("INT8") == INT8
    with pytest.raises(RequestError, match=r"quant is 'int4'; it must be one of none, auto, int8"):
        check_weight_format("int4")


# Hadamard-rotated weights


def random_noise() -> torch.Tensor:
    return torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(9))


def test_noise_correlation_of_scaled_negated_and_other_velocities() -> None:
    noise = random_noise()
    unrelated = torch.randn(noise.shape, generator=torch.Generator().manual_seed(10))
    assert noise_correlation(lambda x: 3 * x + 1, noise) == pytest.approx(1.0)
    assert noise_correlation(lambda x: -x, noise) == pytest.approx(-1.0)
    assert abs(noise_correlation(lambda x: unrelated, noise)) < 0.3
    assert noise_correlation(lambda x: x * float("nan"), noise) == noise_correlation(torch.zeros_like, noise) == 0.0


class InverseBlocks(nn.Module):
    """Two blocks with inverse matrices: predicts about its input, unless the matrices are rotated."""

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))[0]
        self.blocks = nn.ModuleList([ScaledLinear(m, None, None, Scratch()) for m in (matrix, matrix.T.contiguous())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.blocks:
            x = torch.tanh(layer(x))
        return x


def rotate_stored_weights(module: InverseBlocks, size: int) -> None:
    from kadr.kernels.hadamard import hadamard_transform

    for layer in module.blocks:
        layer.weight = hadamard_transform(layer.weight, size)


@pytest.mark.parametrize("size, detected", [(None, None), (64, 0)])
def test_rotated_weights_are_detected_and_rotated_back(size: int | None, detected: int | None) -> None:
    module, noise = InverseBlocks(), torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(4)) / 4
    expected = module(noise)
    if size is not None:
        rotate_stored_weights(module, size)
        assert noise_correlation(module, noise) < 0.5
    assert detect_and_undo_rotation(module, module, noise) == detected
    torch.testing.assert_close(module(noise), expected, rtol=1e-3, atol=1e-4)


def test_weights_that_no_rotation_explains_are_refused() -> None:
    module, noise = InverseBlocks(), torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(4))
    module.blocks[0].weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(8))
    with pytest.raises(ValueError, match=r"^-?0\.\d\d$"):
        detect_and_undo_rotation(module, module, noise)
    assert all(layer.rotation_size is None for layer in module.blocks)


def test_rotating_plain_weights_twice_restores_them() -> None:
    transformer, expected = build_transformer(), predict(build_transformer())
    assert rotate_weights(transformer, 64)
    assert relative_error(predict(transformer), expected) > 0.1
    assert rotate_weights(transformer, 64)
    assert relative_error(predict(transformer), expected) < 1e-4
    assert not rotate_weights(transformer, 512)  # wider than a row
