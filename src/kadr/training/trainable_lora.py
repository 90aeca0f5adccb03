"""Trainable LoRA matrices beside the layers of a frozen transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kadr.errors import RequestError
from kadr.models.lora_layers import LoraWeights
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.nn.linear import Linear
from kadr.quoting import quote
from kadr.sampling.noise import NoiseStreams
from kadr.training.frozen_linear import freeze_base

ATTENTION_LAYERS = tuple(f".{kind}_attention.{name}" for kind in ("self", "cross") for name in ("q", "k", "v", "out"))
FEED_FORWARD_LAYERS = (".feed_forward.up", ".feed_forward.down")
# The layers that a LoRA may adapt, by the ends of their names. The official trainer's default is the first.
TARGET_MODULES: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION_LAYERS,
    "attention+feed-forward": (*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS),
    "all": ("",),
}
# The noise streams that initialize a LoRA are named after layers. The names decide bits, so they stay as they are
# when a layer is renamed: layer name now -> name in the stream.
_STREAM_NAMES = {
    "proj_in": "patch_in",
    "proj_out": "patch_out",
    "caption_proj": "text_in",
    "adaln_linear": "level_bends",
    "time_embed": "level_embedding",
    "linear_1": "first",
    "linear_2": "second",
    "blocks": "layers",
    "cross_attention": "text_attention",
}


class TrainableLoRALinear(nn.Module):
    """y = base(x) + B A x, with A and B in fp32. B starts at 0, so the output starts unchanged.

    Args:
        down: the initial A, (rank, inputs).
        outputs: output features of the layer.
    """

    def __init__(self, base: nn.Module, down: Tensor, outputs: int) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(outputs, len(down)))

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.base_layer(x) + delta


def target_layers(config: TransformerConfig, target_modules: str) -> dict[str, tuple[int, int]]:
    """Returns the layers that a LoRA adapts, with their input and output features.

    Raises:
        RequestError: `target_modules` is not a key of `TARGET_MODULES`.
    """
    if target_modules not in TARGET_MODULES:
        raise RequestError(f"target_modules is {quote(target_modules)}; it must be one of {', '.join(TARGET_MODULES)}.")
    with torch.device("meta"):
        module = Transformer(config)
    return {
        name: (child.in_features, child.out_features)
        for name, child in module.named_modules()
        if isinstance(child, Linear) and name.endswith(TARGET_MODULES[target_modules])
    }


def add_lora_layers(
    transformer: Transformer, layer_sizes: Mapping[str, tuple[int, int]], rank: int, noise_streams: NoiseStreams
) -> dict[str, TrainableLoRALinear]:
    """Wraps layers of a transformer in `TrainableLoRALinear`, and freezes everything else.

    Args:
        layer_sizes: as `target_layers` returns them.
        noise_streams: A starts as noise of the streams "lora NAME", with a standard deviation of 1 / sqrt(3 inputs):
            that of the Kaiming-uniform initialization in PEFT.
    """
    freeze_base(transformer)
    lora_layers = {}
    for name, (inputs, outputs) in layer_sizes.items():
        base = transformer.get_submodule(name)
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        down = noise_streams.draw(f"lora {_stream_name(name)}", (rank, inputs)) * (3 * inputs) ** -0.5
        lora_layers[name] = TrainableLoRALinear(base, down.to(device), outputs)
        _replace_layer(transformer, name, lora_layers[name])
    return lora_layers


def _replace_layer(transformer: Transformer, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(parent), leaf, layer)


def _stream_name(layer: str) -> str:
    return ".".join(_STREAM_NAMES.get(component, component) for component in layer.split("."))


def collect_lora_weights(lora_layers: Mapping[str, TrainableLoRALinear]) -> dict[str, LoraWeights]:
    """Returns the current matrices, detached from the graph."""
    return {name: LoraWeights(layer.down.detach(), layer.up.detach()) for name, layer in lora_layers.items()}


def enable_gradient_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Saves only each block's inputs for the backward pass, and recomputes the rest there.

    It takes half as much time again, for a small part of the memory.
    """
    for block in blocks:
        compute: Callable[..., Tensor] = type(block).compute  # type: ignore[attr-defined]
        block.compute_override = partial(checkpoint, compute, use_reentrant=False)  # type: ignore[assignment]
