"""Attached and merged LoRAs give the same output, in every weight format; at strength 0 they change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from kadr.kernels import int8
from kadr.models.lora_layers import (
    LoraWeights,
    LoraWeightsByLayer,
    attach_loras,
    lora_linears,
    merge_loras,
    set_lora_strengths,
)
from kadr.models.transformer import Transformer
from kadr.nn.linear import LoRALinear
from kadr.quant.convert import quantize_blocks
from kadr.quant.prepack import prepack_linears
from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid
from tests import tiny_models

CPU = torch.device("cpu")
GRID = LatentGrid(2, 4, 4)
ATTENTIONS = ("self_attention", "cross_attention")


def random_lora(
    seed: int = 0, *, targets: Sequence[str] = ("q", "k", "v", "out"), scale: float = 0.5
) -> LoraWeightsByLayer:
    """Draws a LoRA for every block's attentions and feed-forward, and for the input and output projections."""
    generator = torch.Generator().manual_seed(seed)

    def pair(inputs: int, outputs: int) -> LoraWeights:
        down = torch.randn(4, inputs, generator=generator) / inputs**0.5
        return LoraWeights(down, torch.randn(outputs, 4, generator=generator) / 2, scale)

    weights = {"proj_in": pair(tiny_models.CHANNELS, 64), "proj_out": pair(64, tiny_models.CHANNELS)}
    for block in range(2):
        for kind in ATTENTIONS:
            weights |= {f"blocks.{block}.{kind}.{target}": pair(64, 64) for target in targets}
        weights[f"blocks.{block}.feed_forward.up"] = pair(64, 256)
        weights[f"blocks.{block}.feed_forward.down"] = pair(256, 64)
    return weights


def build_transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(tiny_models.transformer_config()), 1)


def run(module: Transformer, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(1, GRID.num_tokens, tiny_models.CHANNELS, generator=generator).to(dtype)
    text = torch.randn(1, 6, tiny_models.TEXT_WIDTH, generator=generator).to(dtype)
    rope = module.compute_rope(token_positions(GRID, fps=24, causal=True)[None])
    return module(tokens, rope, text, None, torch.tensor([[0.7]]))


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.35, -0.8])
def test_attached_lora_equals_merged_lora(strength: float) -> None:
    attached, merged = build_transformer(), build_transformer()
    attach_loras(attached, [random_lora()], torch.float32)
    set_lora_strengths(attached, [strength], CPU)
    merge_loras(merged, [random_lora()], [strength])
    expected = run(merged)
    assert relative_error(run(build_transformer()), expected) > 0.1  # the LoRA has an effect
    assert relative_error(run(attached), expected) < 1e-5


@torch.no_grad()
def test_two_loras_add_both_their_weights() -> None:
    first, second = random_lora(0), random_lora(1, targets=("q", "out"), scale=2.0)
    module, summed = build_transformer(), build_transformer()
    attach_loras(module, [first, second], torch.float32)
    set_lora_strengths(module, [0.7, -0.4], CPU)
    for name in dict.fromkeys([*first, *second]):
        layer = summed.get_submodule(name)
        for strength, lora in ((0.7, first.get(name)), (-0.4, second.get(name))):
            if lora is not None:
                layer.weight.data = layer.weight.data + strength * lora.scale * lora.up @ lora.down
    assert relative_error(run(module), run(summed)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_gives_the_bits_of_the_plain_model(dtype: torch.dtype) -> None:
    plain, module = build_transformer().to(dtype), build_transformer().to(dtype)
    expected = run(plain, dtype)
    attach_loras(module, [random_lora(), random_lora(1)], dtype)
    assert torch.equal(run(module, dtype), expected)  # before any strength is set
    set_lora_strengths(module, [1.0, 0.5], CPU)
    assert not torch.equal(run(module, dtype), expected)
    set_lora_strengths(module, [0.0, 0.0], CPU)
    assert torch.equal(run(module, dtype), expected)


@torch.no_grad()
def test_lora_at_strength_0_leaves_only_the_other() -> None:
    both, single = build_transformer(), build_transformer()
    attach_loras(both, [random_lora(), random_lora(1)], torch.float32)
    set_lora_strengths(both, [0.0, 0.6], CPU)
    attach_loras(single, [random_lora(1)], torch.float32)
    set_lora_strengths(single, [0.6], CPU)
    assert relative_error(run(both), run(single)) < 1e-6


def test_an_equal_strength_keeps_its_tensors() -> None:
    """CUDA graphs have recorded their addresses."""
    module = build_transformer()
    attach_loras(module, [random_lora(), random_lora(1)], torch.float32)

    def scales() -> list[int]:
        return [id(layer.scale) for layer in lora_linears(module)]

    assert not set_lora_strengths(module, [0.0, 0.0], CPU)
    assert set_lora_strengths(module, [0.5, 0.0], CPU)
    before = scales()
    assert not set_lora_strengths(module, [0.5, 0.0], CPU)
    assert scales() == before
    assert set_lora_strengths(module, [0.5, 0.1], CPU)
    assert set_lora_strengths(module, [0.0, 0.0], CPU)
    assert all(layer.scale is None for layer in lora_linears(module))


def quantizer(scheme: str) -> Callable[[nn.Module], None]:
    return lambda module: quantize_blocks(module, scheme, device=CPU)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8-weights", "fp8", "Q8_0", "Q4_K"])
def test_lora_adds_the_same_to_quantized_and_plain_weights(scheme: str) -> None:
    """The layer's output changes by B A x, up to rounding of the base."""
    module, plain = build_transformer(), build_transformer()
    quantizer(scheme)(module)
    attach_loras(module, [random_lora()], torch.float32)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    layer = module.blocks[1].self_attention.q
    assert isinstance(layer, LoRALinear)
    base_output = layer(x)
    set_lora_strengths(module, [0.8], CPU)
    lora = random_lora()["blocks.1.self_attention.q"]
    expected = 0.8 * 0.5 * x @ lora.down.T @ lora.up.T
    assert torch.allclose(layer(x) - base_output, expected, atol=1e-5)
    merge_loras(plain, [random_lora()], [0.8])
    assert relative_error(run(module), run(plain)) < 0.12  # the error of the scheme itself


@torch.no_grad()
def test_8bit_layers_with_loras_quantize_a_shared_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_transformer()
    quantizer("int8")(module)
    attach_loras(module, [random_lora()], torch.float32)
    calls = []
    for layer in (module.blocks[0].self_attention.q, module.blocks[0].self_attention.k):
        original = layer.base.quantize_input
        monkeypatch.setattr(
            layer.base,
            "quantize_input",
            lambda x, *, gelu=False, original=original: (calls.append(1), original(x, gelu=gelu))[1],
        )
    set_lora_strengths(module, [1.0], CPU)
    run(module)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.skipif(not int8.has_int8_units(), reason="this CPU multiplies no 8-bit numbers by oneDNN")
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_base_layers_of_loras_are_prepacked(scheme: str | None) -> None:
    module, plain = build_transformer().bfloat16(), build_transformer().bfloat16()
    for model in (module, plain):
        if scheme:
            quantizer(scheme)(model)
    attach_loras(module, [random_lora()], torch.bfloat16)
    for model in (module, plain):
        prepack_linears(model)
    expected = run(plain, torch.bfloat16)
    assert torch.equal(run(module, torch.bfloat16), expected)
    set_lora_strengths(module, [1.0], CPU)
    output = run(module, torch.bfloat16)
    assert {type(layer.base) for layer in lora_linears(module)} <= {type(layer) for layer in plain.modules()}
    reference = build_transformer()
    merge_loras(reference, [random_lora()], [1.0])
    assert relative_error(output, run(reference)) < 0.05


def test_merging_into_a_quantized_layer_is_refused() -> None:
    module = build_transformer()
    quantizer("int8-weights")(module)
    block_lora = {name: lora for name, lora in random_lora().items() if name.startswith("blocks")}
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attention\.q"):
        merge_loras(module, [block_lora], [1.0])


def test_merging_does_not_change_the_old_weight_tensor() -> None:
    module = build_transformer()
    weight = module.blocks[0].self_attention.q.weight.data
    before = weight.clone()
    merge_loras(module, [random_lora()], [1.0])
    assert torch.equal(weight, before)
    assert not torch.equal(module.blocks[0].self_attention.q.weight, before)
