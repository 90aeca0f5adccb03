"""The matrices that learn, beside the layers of a finished transformer."""

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
from kadr.sampling.noise import NoiseStreams
from kadr.training.frozen_linear import freeze_base

ATTENTION_LAYERS = tuple(f".{kind}_attention.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "out"))
FEED_FORWARD_LAYERS = (".feed_forward.up", ".feed_forward.down")
# What a LoRA may change: the ends of layers' names. The official trainer's default is the first.
TARGET_MODULES: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION_LAYERS,
    "attention+feed-forward": (*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS),
    "all": ("",),
}


# A LoRA begins with the noise of streams that are named after its layers. The names decide bits, so they are these
# whatever the layers are called now.
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
    """y = base(x) + B A x, with A and B in fp32. B begins at 0, so at first nothing is added.

    Args:
        down: A, (rank, inputs), as it begins.
        outputs: of the layer.
    """

    def __init__(self, base: nn.Module, down: Tensor, outputs: int) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(outputs, len(down)))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.base_layer(x) + added


def target_layers(config: TransformerConfig, target_modules: str) -> dict[str, tuple[int, int]]:
    """The layers that a LoRA changes, with what they take and give.

    Raises:
        RequestError: there is no such choice.
    """
    if target_modules not in TARGET_MODULES:
        raise RequestError(f"targets are {target_modules!r}; they must be one of {', '.join(TARGET_MODULES)}.")
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
    """Put matrices that learn beside some layers of a transformer, and let nothing else of it learn.

    Args:
        layer_sizes: as `target_layers` gives them.
        noise_streams: A begins with noise of the streams "lora NAME", with a standard deviation of 1 / sqrt(3 inputs):
            that of Kaiming's uniform initialisation, which PEFT takes.
    """
    freeze_base(transformer)
    made = {}
    for name, (inputs, outputs) in layer_sizes.items():
        base = transformer.get_submodule(name)
        place = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        down = noise_streams.draw(f"lora {_stream_name(name)}", (rank, inputs)) * (3 * inputs) ** -0.5
        made[name] = TrainableLoRALinear(base, down.to(place), outputs)
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, made[name])
    return made


def _stream_name(layer: str) -> str:
    return ".".join(_STREAM_NAMES.get(part, part) for part in layer.split("."))


def collect_lora_weights(lora_layers: Mapping[str, TrainableLoRALinear]) -> dict[str, LoraWeights]:
    """What they add by now."""
    return {name: LoraWeights(layer.down.detach(), layer.up.detach()) for name, layer in lora_layers.items()}


def enable_gradient_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Keep only what each block was given, and compute the rest of it again when gradients pass: half as much time
    again, for a small part of the memory."""
    for block in blocks:
        compute: Callable[..., Tensor] = block.compute  # type: ignore[assignment]
        block.compiled = partial(checkpoint, compute, use_reentrant=False)  # type: ignore[assignment]
