"""LoRAs on a finished module: put beside the weights, where their strengths can change, or added to them for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kadr.nn.linear import Linear, LoRALinear

_ROWS_AT_A_TIME = 1024  # of a weight that are added to at a time: their fp32 copies are small then


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA adds to one layer's weight at strength 1: scale · up · down.

    Args:
        down: (rank, inputs).
        up: (outputs, rank).
        scale: alpha / rank, or what else the file says.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


LoraWeightsByLayer = Mapping[str, LoraWeights]  # by the layer's name in the module


def attach_loras(module: nn.Module, loras: Sequence[LoraWeightsByLayer], dtype: torch.dtype) -> None:
    """Put LoRAs beside the layers they are for. They add nothing until `set_lora_strengths` says how much.

    Args:
        module: finished: its layers may be stored in any way by now.
        dtype: that is computed in.
    """
    for name in dict.fromkeys(name for additions in loras for name in additions):
        own = [(number, additions[name]) for number, additions in enumerate(loras) if name in additions]
        down = torch.cat([each.down.to(dtype) for _, each in own])
        up = torch.cat([each.up.to(dtype) for _, each in own], dim=1)
        made = LoRALinear(module.get_submodule(name), down, up)
        made.segments = tuple((number, each.scale, len(each.down)) for number, each in own)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, made.eval())


def set_lora_strengths(module: nn.Module, strengths: Sequence[float], device: torch.device) -> None:
    """How much each LoRA of a module adds from now on: one number each, in the order of `attach_loras`."""
    for layer in lora_linears(module):
        pieces = [torch.full((rank,), strengths[number] * scale) for number, scale, rank in layer.segments]
        layer.set_scale(torch.cat(pieces).to(device))


def lora_linears(module: nn.Module) -> Iterable[LoRALinear]:
    """The layers that something may be added to."""
    return (child for child in module.modules() if isinstance(child, LoRALinear))


def merge_loras(module: nn.Module, loras: Sequence[LoraWeightsByLayer], strengths: Sequence[float]) -> None:
    """Add LoRAs to the weights themselves, summed in fp32 and rounded once.

    Args:
        module: the layers that are added to are plain.

    Raises:
        ValueError: one is not; it carries the layer's name.
    """
    for name in dict.fromkeys(name for additions in loras for name in additions):
        layer = module.get_submodule(name)
        if not isinstance(layer, Linear):
            raise ValueError(name)
        own = [(strengths[number], loras[number][name]) for number in range(len(loras)) if name in loras[number]]
        if any(strength for strength, _ in own):
            layer.weight.data = _merge_weight(layer.weight.data, own)


def _merge_weight(weight: Tensor, loras: Sequence[tuple[float, LoraWeights]]) -> Tensor:
    made = torch.empty_like(weight)  # a new one: the old one may be the file's
    for rows in (slice(start, start + _ROWS_AT_A_TIME) for start in range(0, len(weight), _ROWS_AT_A_TIME)):
        total = weight[rows].float()
        for strength, each in loras:
            total = total.addmm(each.up[rows].float(), each.down.float(), alpha=strength * each.scale)
        made[rows] = total
    return made
