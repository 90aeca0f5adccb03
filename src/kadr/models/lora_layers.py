"""Attaches LoRAs to a loaded module with adjustable strengths, or merges them into its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
from kadr.nn.linear import Linear, LoRALinear

_MERGE_ROWS = 1024  # rows of a weight that are merged at a time, to keep their fp32 copies small


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA's weights for one layer; at strength 1 it adds scale · up · down to the layer's weight.

    Args:
        down: (rank, inputs).
        up: (outputs, rank).
        scale: alpha / rank, or the scale that the file gives.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


LoraWeightsByLayer = Mapping[str, LoraWeights]  # by the layer's name in the module


def attach_loras(module: nn.Module, loras: Sequence[LoraWeightsByLayer], dtype: torch.dtype) -> None:
    """Wraps the layers that LoRAs target. The LoRAs add nothing until `set_lora_strengths` is called.

    Args:
        module: loaded, with its layers in any weight format.
        dtype: of the computation.
    """
    for name in dict.fromkeys(name for lora in loras for name in lora):
        check_cancelled()
        layer_loras = [(index, lora[name]) for index, lora in enumerate(loras) if name in lora]
        down = torch.cat([weights.down.to(dtype) for _, weights in layer_loras])
        up = torch.cat([weights.up.to(dtype) for _, weights in layer_loras], dim=1)
        lora_linear = LoRALinear(module.get_submodule(name), down, up)
        lora_linear.segments = tuple((index, weights.scale, len(weights.down)) for index, weights in layer_loras)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, lora_linear.eval())


def set_lora_strengths(module: nn.Module, strengths: Sequence[float], device: torch.device) -> bool:
    """Sets the strength of each LoRA of a module, in the order of `attach_loras`. Returns whether any changed."""
    has_changed = False
    for layer in lora_linears(module):
        scales = [torch.full((rank,), strengths[index] * scale) for index, scale, rank in layer.segments]
        has_changed |= layer.set_scale(torch.cat(scales), device)
    return has_changed


def lora_linears(module: nn.Module) -> Iterable[LoRALinear]:
    """Returns the layers of a module that have LoRAs attached."""
    return (child for child in module.modules() if isinstance(child, LoRALinear))


def merge_loras(module: nn.Module, loras: Sequence[LoraWeightsByLayer], strengths: Sequence[float]) -> None:
    """Adds LoRAs to the weights of a module, summed in fp32 and rounded once.

    Args:
        module: the targeted layers must be plain `Linear`.

    Raises:
        ValueError: a targeted layer is not; the message is its name.
    """
    for name in dict.fromkeys(name for lora in loras for name in lora):
        layer = module.get_submodule(name)
        if not isinstance(layer, Linear):
            raise ValueError(name)
        layer_loras = [(strengths[index], loras[index][name]) for index in range(len(loras)) if name in loras[index]]
        if any(strength for strength, _ in layer_loras):
            layer.weight.data = _merge_weight(layer.weight.data, layer_loras)


def _merge_weight(weight: Tensor, loras: Sequence[tuple[float, LoraWeights]]) -> Tensor:
    merged = torch.empty_like(weight)  # a new tensor: the old one may be a mapping of the file
    for rows in (slice(start, start + _MERGE_ROWS) for start in range(0, len(weight), _MERGE_ROWS)):
        check_cancelled()
        total = weight[rows].float()
        for strength, lora in loras:
            total = total.addmm(lora.up[rows].float(), lora.down.float(), alpha=strength * lora.scale)
        merged[rows] = total
    return merged
