"""LoRAs beside the weights and in them: the same numbers, whatever the weights are stored as; at 0, none at all."""

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
OURS = {"attn1": "self_attention", "attn2": "cross_attention"}


def additions(
    seed: int = 0, *, targets: Sequence[str] = ("q", "k", "v", "out"), scale: float = 0.5
) -> LoraWeightsByLayer:
    """For every block's attentions, both layers of its feed-forward, and the way in and out."""
    generator = torch.Generator().manual_seed(seed)

    def pair(inputs: int, outputs: int) -> LoraWeights:
        down = torch.randn(4, inputs, generator=generator) / inputs**0.5
        return LoraWeights(down, torch.randn(outputs, 4, generator=generator) / 2, scale)

    made = {"proj_in": pair(tiny_models.CHANNELS, 64), "proj_out": pair(64, tiny_models.CHANNELS)}
    for block in range(2):
        for kind in OURS.values():
            made |= {f"blocks.{block}.{kind}.{target}": pair(64, 64) for target in targets}
        made[f"blocks.{block}.feed_forward.up"] = pair(64, 256)
        made[f"blocks.{block}.feed_forward.down"] = pair(256, 64)
    return made


def transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(tiny_models.transformer_config()), 1)


def run(module: Transformer, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(1, GRID.num_tokens, tiny_models.CHANNELS, generator=generator).to(dtype)
    text = torch.randn(1, 6, tiny_models.TEXT_WIDTH, generator=generator).to(dtype)
    rope = module.compute_rope(token_positions(GRID, fps=24, causal=True)[None])
    return module(tokens, rope, text, None, torch.tensor([[0.7]]))


def relative(made: Tensor, right: Tensor) -> float:
    return float((made.float() - right.float()).norm() / right.float().norm())


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.35, -0.8])
def test_attached_lora_equals_merged_lora(strength: float) -> None:
    beside, merged = transformer(), transformer()
    attach_loras(beside, [additions()], torch.float32)
    set_lora_strengths(beside, [strength], CPU)
    merge_loras(merged, [additions()], [strength])
    right = run(merged)
    assert relative(run(transformer()), right) > 0.1  # it does something
    assert relative(run(beside), right) < 1e-5


@torch.no_grad()
def test_two_loras_add_both_their_weights() -> None:
    one, other = additions(0), additions(1, targets=("q", "out"), scale=2.0)
    module, summed = transformer(), transformer()
    attach_loras(module, [one, other], torch.float32)
    set_lora_strengths(module, [0.7, -0.4], CPU)
    for name in dict.fromkeys([*one, *other]):
        layer = summed.get_submodule(name)
        for strength, each in ((0.7, one.get(name)), (-0.4, other.get(name))):
            if each is not None:
                layer.weight.data = layer.weight.data + strength * each.scale * each.up @ each.down
    assert relative(run(module), run(summed)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_gives_the_bits_of_the_plain_model(dtype: torch.dtype) -> None:
    plain, module = transformer().to(dtype), transformer().to(dtype)
    right = run(plain, dtype)
    attach_loras(module, [additions(), additions(1)], dtype)
    assert torch.equal(run(module, dtype), right)  # before anybody said how much
    set_lora_strengths(module, [1.0, 0.5], CPU)
    assert not torch.equal(run(module, dtype), right)
    set_lora_strengths(module, [0.0, 0.0], CPU)
    assert torch.equal(run(module, dtype), right)


@torch.no_grad()
def test_lora_at_strength_0_leaves_only_the_other() -> None:
    both, alone = transformer(), transformer()
    attach_loras(both, [additions(), additions(1)], torch.float32)
    set_lora_strengths(both, [0.0, 0.6], CPU)
    attach_loras(alone, [additions(1)], torch.float32)
    set_lora_strengths(alone, [0.6], CPU)
    assert relative(run(both), run(alone)) < 1e-6


def quantized(scheme: str) -> Callable[[nn.Module], None]:
    return lambda module: quantize_blocks(module, scheme, device=CPU)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8-weights", "fp8", "Q8_0", "Q4_K"])
def test_lora_adds_the_same_to_quantized_and_plain_weights(scheme: str) -> None:
    """The layer's outcome moves by B A x, to the rounding of what the base is computed in."""
    module, plain = transformer(), transformer()
    quantized(scheme)(module)
    attach_loras(module, [additions()], torch.float32)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    layer = module.blocks[1].self_attention.q
    assert isinstance(layer, LoRALinear)
    without = layer(x)
    set_lora_strengths(module, [0.8], CPU)
    each = additions()["blocks.1.self_attention.q"]
    expected = 0.8 * 0.5 * x @ each.down.T @ each.up.T
    assert torch.allclose(layer(x) - without, expected, atol=1e-5)
    merge_loras(plain, [additions()], [0.8])
    assert relative(run(module), run(plain)) < 0.12  # what the scheme costs by itself


@torch.no_grad()
def test_8bit_layers_with_loras_quantize_a_shared_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformer()
    quantized("int8")(module)
    attach_loras(module, [additions()], torch.float32)
    counted = []
    for layer in (module.blocks[0].self_attention.q, module.blocks[0].self_attention.k):
        original = layer.base.quantize_input
        monkeypatch.setattr(
            layer.base,
            "quantize_input",
            lambda x, *, gelu=False, original=original: (counted.append(1), original(x, gelu=gelu))[1],
        )
    set_lora_strengths(module, [1.0], CPU)
    run(module)
    assert len(counted) == 1


@torch.no_grad()
@pytest.mark.skipif(not int8.has_int8_units(), reason="this CPU multiplies no 8-bit numbers by oneDNN")
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_base_layers_of_loras_are_prepacked(scheme: str | None) -> None:
    module, plain = transformer().bfloat16(), transformer().bfloat16()
    for each in (module, plain):
        if scheme:
            quantized(scheme)(each)
    attach_loras(module, [additions()], torch.bfloat16)
    for each in (module, plain):
        prepack_linears(each)
    right = run(plain, torch.bfloat16)
    assert torch.equal(run(module, torch.bfloat16), right)
    set_lora_strengths(module, [1.0], CPU)
    made = run(module, torch.bfloat16)
    assert {type(layer.base) for layer in lora_linears(module)} <= {type(layer) for layer in plain.modules()}
    reference = transformer()
    merge_loras(reference, [additions()], [1.0])
    assert relative(made, run(reference)) < 0.05


def test_merging_into_a_quantized_layer_is_refused() -> None:
    module = transformer()
    quantized("int8-weights")(module)
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attention\.q"):
        merge_loras(module, [{name: each for name, each in additions().items() if name.startswith("blocks")}], [1.0])


def test_merging_does_not_change_the_old_weight_tensor() -> None:
    module = transformer()
    weight = module.blocks[0].self_attention.q.weight.data
    before = weight.clone()
    merge_loras(module, [additions()], [1.0])
    assert torch.equal(weight, before)
    assert not torch.equal(module.blocks[0].self_attention.q.weight, before)
