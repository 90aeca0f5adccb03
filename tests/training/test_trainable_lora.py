"""Trainable LoRA layers, and gradients through frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from kadr.checkpoints.keys import TRANSFORMER_KEYS, map_keys
from kadr.errors import RequestError
from kadr.kernels import mode
from kadr.kernels.hadamard import hadamard_transform
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
from tests.models.test_transformer import Inputs, run_diffusers, velocity
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
    prompt_embeds = torch.randn(2, 5, tiny_models.TEXT_WIDTH, generator=generator)
    rope = module.compute_rope(token_positions(GRID, fps=24, causal=True)[None])
    return module(noise if tokens is None else tokens, rope, prompt_embeds, None, torch.tensor([[0.4], [0.9]]))


def trained(module: Transformer, targets: str = "attention", rank: int = 3) -> dict:
    """Adds LoRA layers with random matrices, as after some training."""
    layers = add_lora_layers(module, target_layers(module.config, targets), rank, NoiseStreams(1))
    for layer in layers.values():
        layer.up.data.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    return layers


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def record_numel(sizes: list[int], tensor: Tensor) -> Tensor:
    """Hook for the tensors that autograd saves."""
    sizes.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("targets", TARGET_MODULES)
def test_target_modules_alone_train_and_the_output_starts_unchanged(targets: str) -> None:
    module = transformer()
    before = run(module)
    layers = add_lora_layers(module, target_layers(module.config, targets), 3, NoiseStreams(1))
    assert len(layers) == {"attention": 16, "attention+feed-forward": 20, "all": 27}[targets]
    assert torch.equal(run(module), before)
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert names == {f"{name}.{matrix}" for name in layers for matrix in ("down", "up")}


class RecordingNoise(NoiseStreams):
    """Noise streams that record the names they are drawn from."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.names: list[str] = []

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        self.names.append(name)
        return super().draw(name, shape)


def test_noise_streams_keep_their_names_whatever_layers_are_called() -> None:
    """The names decide a LoRA's initial matrices: they outlive every rename of a layer."""
    attention = [f"{kind}_attention.{name}" for kind in ("self", "text") for name in ("q", "k", "v", "out")]
    block = [*attention, "feed_forward.up", "feed_forward.down"]
    outer = [
        *("patch_in", "patch_out", "level_bends", "level_embedding.first", "level_embedding.second"),
        *("text_in.up", "text_in.down"),
    ]
    module, noise = transformer(), RecordingNoise(1)
    add_lora_layers(module, target_layers(module.config, "all"), 3, noise)
    expected = [*outer, *(f"layers.{index}.{name}" for index in range(module.config.num_layers) for name in block)]
    assert len(noise.names) == len(expected)
    assert set(noise.names) == {f"lora {name}" for name in expected}


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(
        RequestError, match=r"target_modules is 'everything'; it must be one of attention, attention\+feed"
    ):
        target_layers(tiny_models.transformer_config(), "everything")


def test_a_2b_lora_has_the_size_of_the_official_trainers() -> None:
    layers = target_layers(TRANSFORMER_2B, "attention")
    assert len(layers) == 28 * 8
    assert sum(32 * (inputs + outputs) for inputs, outputs in layers.values()) == 28 * 8 * 32 * 4096


@pytest.mark.parametrize("scheme", SCHEMES)
def test_attached_lora_equals_the_trained_layers(scheme: str | None) -> None:
    module, plain = transformer(), transformer()
    for network in (module, plain):
        if scheme is not None:
            quantize_blocks(network, scheme, device=CPU)
    layers = trained(module, "attention+feed-forward")
    attach_loras(plain, [collect_lora_weights(layers)], torch.float32)
    set_lora_strengths(plain, [1.0], CPU)
    assert relative_error(run(module), run(plain)) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_through_quantized_weights_equal_dequantized_ones(scheme: str | None) -> None:
    module, plain = transformer(), transformer()
    if scheme is not None:
        quantize_blocks(module, scheme, device=CPU)
        for name, child in module.named_modules():
            if isinstance(child, DequantizingLinear | W8A8Linear):
                linear = plain.get_submodule(name)
                linear.weight.data = child.dequantize_weight(linear.weight).clone()
    gradients = []
    for network in (module, plain):
        layers = trained(network)
        run(network).square().mean().backward()
        gradients.append([layer.down.grad for layer in layers.values()] + [layer.up.grad for layer in layers.values()])
    bound = 0.1 if scheme == "int8" else 1e-4  # int8 rounds the products themselves
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < bound


@pytest.mark.parametrize("block", [8, 64])
def test_gradient_of_a_rotated_weight_is_rotated_back(block: int) -> None:
    weight, x = torch.randn(6, 64), torch.randn(3, 64, requires_grad=True)
    rotated = ScaledLinear(hadamard_transform(weight, block), None, None, Scratch(), rotation_size=block)
    x_plain = x.detach().clone().requires_grad_()
    FrozenLinear(rotated)(x).square().sum().backward()
    nn.functional.linear(x_plain, weight).square().sum().backward()
    assert relative_error(x.grad, x_plain.grad) < 1e-5


def test_dequantized_weights_are_not_saved_for_backward() -> None:
    module = transformer()
    quantize_blocks(module, "Q8_0", device=CPU)
    trained(module)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor.shape), tensor)[1], lambda t: t):
        run(module)
    assert saved
    assert not any(shape in ((256, 64), (64, 256)) for shape in saved)  # of the feed-forward, which is frozen


def test_gradient_checkpointing_gives_the_same_gradients_and_saves_less() -> None:
    gradients, saved = [], []
    for checkpointing in (False, True):
        module = transformer()
        layers = trained(module)
        if checkpointing:
            enable_gradient_checkpointing(module.blocks)
        saved.append([])
        with torch.autograd.graph.saved_tensors_hooks(partial(record_numel, saved[-1]), lambda tensor: tensor):
            loss = run(module).square().mean()
        loss.backward()
        gradients.append([layer.up.grad for layer in layers.values()])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*gradients, strict=True))
    assert sum(saved[1]) < 0.5 * sum(saved[0])


def test_base_weights_do_not_change() -> None:
    module = transformer()
    before = {name: child.weight.clone() for name, child in module.named_modules() if isinstance(child, Linear)}
    layers = trained(module)
    optimizer = torch.optim.AdamW([matrix for layer in layers.values() for matrix in (layer.down, layer.up)])
    run(module).square().mean().backward()
    optimizer.step()
    for name, weight in before.items():
        base = module.get_submodule(name)
        assert torch.equal(getattr(base, "base_layer", base).weight, weight)


def test_gradients_equal_those_of_peft() -> None:
    config = tiny_models.transformer_config()
    module, inputs = tiny_models.build_random(lambda: Transformer(config), seed=3), Inputs.random(config)
    adapter = LoraConfig(
        r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    )
    peft_model = get_peft_model(diffusers_transformer(module), adapter)
    layers, parameters = trained(module, "attention+feed-forward"), dict(peft_model.named_parameters())
    keys = map_keys(TRANSFORMER_KEYS, [f"{name}.weight" for name in layers], is_diffusers=True)
    pairs = []
    for name, layer in layers.items():
        prefix = f"base_model.model.{keys[f'{name}.weight'].removesuffix('.weight')}"
        pairs += [(layer.down, parameters[f"{prefix}.lora_A.default.weight"])]
        pairs += [(layer.up, parameters[f"{prefix}.lora_B.default.weight"])]
    with torch.no_grad():
        for matrix, peft_matrix in pairs:
            peft_matrix.copy_(matrix)
    velocity(module, inputs).square().mean().backward()
    run_diffusers(peft_model, inputs).square().mean().backward()
    for matrix, peft_matrix in pairs:
        assert relative_error(matrix.grad, peft_matrix.grad) < 1e-4
