"""Matrices that learn, and gradients through weights that do not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from kadr.checkpoints.keys import TRANSFORMER_KEYS, map_keys
from kadr.errors import RequestError
from kadr.kernels import mode
from kadr.models.lora_layers import attach_loras, set_lora_strengths
from kadr.models.transformer import TRANSFORMER_2B, Transformer
from kadr.nn.linear import Linear
from kadr.quant.convert import quantize_blocks
from kadr.quant.layers import DequantizingLinear, ScaledLinear, Scratch, W8A8Linear
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid
from kadr.training.frozen_linear import FrozenLinear
from kadr.training.trainable_lora import (
    TARGET_MODULES,
    add_lora_layers,
    collect_lora_weights,
    enable_gradient_checkpointing,
    target_layers,
)
from tests import tiny_models
from tests.models.test_transformer import Inputs, asked_of_diffusers, velocity
from tests.oracles import diffusers_transformer

GRID, CPU = LatentGrid(2, 2, 3), torch.device("cpu")
SCHEMES = (None, "int8", "int8-weights", "fp8-weights", "Q8_0")


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    with mode.override(mode.REFERENCE):
        yield


def transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(tiny_models.transformer_config()), seed=3)


def run(module: Transformer, tokens: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, GRID.num_tokens, tiny_models.CHANNELS, generator=generator)
    text = torch.randn(2, 5, tiny_models.TEXT_WIDTH, generator=generator)
    rope = module.compute_rope(token_positions(GRID, fps=24, causal=True)[None])
    return module(noise if tokens is None else tokens, rope, text, None, torch.tensor([[0.4], [0.9]]))


def trained(module: Transformer, targets: str = "attention", rank: int = 3) -> dict:
    """Layers whose matrices are random by now."""
    layers = add_lora_layers(module, target_layers(module.config, targets), rank, NoiseStreams(1))
    for layer in layers.values():
        layer.up.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    return layers


def relative(made: Tensor, right: Tensor) -> float:
    return float((made - right).detach().norm() / right.detach().norm())


def noted(kept: list[int], tensor: Tensor) -> Tensor:
    """A hook that sees what autograd keeps."""
    kept.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("targets", TARGET_MODULES)
def test_what_learns_is_what_was_asked_for_and_begins_without_a_trace(targets: str) -> None:
    module = transformer()
    before = run(module)
    layers = add_lora_layers(module, target_layers(module.config, targets), 3, NoiseStreams(1))
    assert len(layers) == {"attention": 16, "attention+feed-forward": 20, "all": 27}[targets]
    assert torch.equal(run(module), before)
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert names == {f"{name}.{half}" for name in layers for half in ("down", "up")}


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(RequestError, match=r"targets are 'everything'; they must be one of attention, attention\+feed"):
        target_layers(tiny_models.transformer_config(), "everything")


def test_a_lora_of_a_2b_model_has_the_size_that_the_official_trainer_gives_it() -> None:
    layers = target_layers(TRANSFORMER_2B, "attention")
    assert len(layers) == 28 * 8
    assert sum(32 * (inputs + outputs) for inputs, outputs in layers.values()) == 28 * 8 * 32 * 4096


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_learned_adds_the_same_when_it_is_attached(scheme: str | None) -> None:
    module, plain = transformer(), transformer()
    for each in (module, plain):
        if scheme is not None:
            quantize_blocks(each, scheme, device=CPU)
    layers = trained(module, "attention+feed-forward")
    attach_loras(plain, [collect_lora_weights(layers)], torch.float32)
    set_lora_strengths(plain, [1.0], CPU)
    assert relative(run(module), run(plain)) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_through_stored_weights_as_through_the_plain_ones_they_stand_for(scheme: str | None) -> None:
    module, plain = transformer(), transformer()
    if scheme is not None:
        quantize_blocks(module, scheme, device=CPU)
        for name, child in module.named_modules():
            if isinstance(child, DequantizingLinear | W8A8Linear):
                own = plain.get_submodule(name)
                own.weight.data = child.dequantize_weight(own.weight).clone()
    made = []
    for each in (module, plain):
        layers = trained(each)
        run(each).square().mean().backward()
        made.append([layer.down.grad for layer in layers.values()] + [layer.up.grad for layer in layers.values()])
    bound = 0.1 if scheme == "int8" else 1e-4  # the products themselves are rounded there
    for ours, right in zip(*made, strict=True):
        assert relative(ours, right) < bound


@pytest.mark.parametrize("block", [8, 64])
def test_a_gradient_is_turned_back_where_the_weight_was_stored_turned(block: int) -> None:
    from kadr.kernels.hadamard import hadamard_transform

    weight, x = torch.randn(6, 64), torch.randn(3, 64, requires_grad=True)
    turned = ScaledLinear(hadamard_transform(weight, block), None, None, Scratch(), rotation_size=block)
    again = x.detach().clone().requires_grad_()
    FrozenLinear(turned)(x).square().sum().backward()
    nn.functional.linear(again, weight).square().sum().backward()
    assert relative(x.grad, again.grad) < 1e-5


def test_unpacked_weights_are_not_kept_for_the_gradient() -> None:
    module = transformer()
    quantize_blocks(module, "Q8_0", device=CPU)
    trained(module)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda t: t):
        run(module)
    assert kept
    assert not any(shape in ((256, 64), (64, 256)) for shape in kept)  # of the feed-forward, which does not learn


def test_layers_that_are_computed_twice_give_the_same_gradients_and_keep_less() -> None:
    made, kept = [], []
    for twice in (False, True):
        module = transformer()
        layers = trained(module)
        if twice:
            enable_gradient_checkpointing(module.blocks)
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, kept[-1]), lambda tensor: tensor):
            loss = run(module).square().mean()
        loss.backward()
        made.append([layer.up.grad for layer in layers.values()])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert sum(kept[1]) < 0.5 * sum(kept[0])


def test_the_model_itself_is_not_changed() -> None:
    module = transformer()
    before = {name: child.weight.clone() for name, child in module.named_modules() if isinstance(child, Linear)}
    layers = trained(module)
    optimizer = torch.optim.AdamW([half for layer in layers.values() for half in (layer.down, layer.up)])
    run(module).square().mean().backward()
    optimizer.step()
    for name, weight in before.items():
        base = module.get_submodule(name)
        assert torch.equal(getattr(base, "base", base).weight, weight)


def test_gradients_are_those_of_peft() -> None:
    config = tiny_models.transformer_config()
    module, given = tiny_models.build_random(lambda: Transformer(config), seed=3), Inputs.of(config)
    adapter = LoraConfig(
        r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    )
    theirs = get_peft_model(diffusers_transformer(module), adapter)
    layers, parameters = trained(module, "attention+feed-forward"), dict(theirs.named_parameters())
    table = map_keys(TRANSFORMER_KEYS, [f"{name}.weight" for name in layers], is_diffusers=True)
    pairs = []
    for name, layer in layers.items():
        start = f"base_model.model.{table[f'{name}.weight'].removesuffix('.weight')}"
        pairs += [(layer.down, parameters[f"{start}.lora_A.default.weight"])]
        pairs += [(layer.up, parameters[f"{start}.lora_B.default.weight"])]
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours)
    velocity(module, given).square().mean().backward()
    asked_of_diffusers(theirs, given).square().mean().backward()
    for ours, other in pairs:
        assert relative(ours.grad, other.grad) < 1e-4
