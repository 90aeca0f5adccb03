"""Names in LoRA files: which layer of the transformer each tensor is for, in whosever words.

Families of names, for a layer m such as transformer_blocks.7.attn1.to_q:

    diffusers   transformer.m.lora_A.weight                   as diffusers saves them, and trainers for it
    Comfy       diffusion_model.m.lora_A.weight               Lightricks' own releases
    PEFT        base_model.model.m.lora_A.weight              beside an adapter_config.json
    kohya       lora_unet_m.lora_down.weight, ....alpha       with _ for every dot of m, or with dots
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from kadr.checkpoints.keys import TRANSFORMER_KEYS, map_keys
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.nn.linear import Linear

BLOCKS_PREFIX, WEIGHT_SUFFIX = "blocks.", ".weight"
PEFT, NO_PREFIX = "PEFT", "plain"  # the last: names without any of these prefixes
_FORMAT_BY_PREFIX = {
    "base_model.model.": PEFT,
    "model.diffusion_model.": "Comfy",
    "diffusion_model.": "Comfy",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
}
# What the end of a name says that the tensor is. PEFT may put the name of the adapter in between: lora_A.default.
_ROLE_SUFFIXES = (
    ("down", re.compile(r"\.(lora_A(\.[^.]+)?|lora_down|lora\.down)\.weight$")),
    ("up", re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|lora\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)
# Ends of adapters in which a layer's product is another one. Without these tensors a file would run, and be wrong.
_UNSUPPORTED_ADAPTERS = (
    ("DoRA", re.compile(r"\.(dora_scale|lora_magnitude_vector(\.[^.]+)?(\.weight)?)$")),
    ("a LoRA with biases", re.compile(r"\.lora_B(\.[^.]+)?\.bias$")),
    ("LoCon with a matrix between", re.compile(r"\.lora_mid\.weight$")),
    ("LoHa", re.compile(r"\.hada_[wt][12](_[ab])?$")),
    ("LoKr", re.compile(r"\.lokr_[wt][12](_[ab])?$")),
)
_LTX2_LAYER = re.compile(r"(^|[._])(audio_|av_ca_|video_to_audio|video_embeddings_connector|vocoder)")


@dataclass(frozen=True)
class LoraKeys:
    """The tensors of a file.

    Args:
        layers: kadr's name of a layer -> its tensors by role, "down", "up" and "alpha".
        unexpected_keys: names that are of no layer, or of one that another tensor is for already.
        key_format: that most names are of.
    """

    layers: Mapping[str, Mapping[str, str]]
    unexpected_keys: tuple[str, ...]
    key_format: str

    @classmethod
    def parse(cls, keys: Iterable[str]) -> LoraKeys:
        """From the names of all tensors of a file."""
        layers: dict[str, dict[str, str]] = {}
        strangers, families = [], dict[str, int]()
        for name in keys:
            family, layer, role = _parse_key(name)
            if layer is None or role in layers.get(layer, ()):
                strangers.append(name)
                continue
            layers.setdefault(layer, {})[role] = name
            families[family] = families.get(family, 0) + 1
        return cls(layers, tuple(strangers), max(families, key=families.__getitem__, default=NO_PREFIX))


def is_adapter_key(key: str) -> bool:
    """Whether a tensor is of an adapter, of a kind that is read or not."""
    return _find_role(key) in ("down", "up") or unsupported_adapter_kind(key) is not None


def unsupported_adapter_kind(key: str) -> str | None:
    """The kind of adapter that a tensor is of, in words, where it is none of pairs of matrices alone."""
    return next((kind for kind, pattern in _UNSUPPORTED_ADAPTERS if pattern.search(key)), None)


def is_ltx2_key(key: str) -> bool:
    """Whether a tensor is of the layers for sound that LTX-2 has and this family has not."""
    return _LTX2_LAYER.search(key) is not None


def strip_role(key: str) -> str:
    """A tensor's name without its role: that of its layer, in the file's words."""
    for _, pattern in _ROLE_SUFFIXES:
        key = pattern.sub("", key)
    return key


def strip_prefix(name: str) -> str:
    """A layer's name in the file's words, without what its family puts in front."""
    while prefix := next((prefix for prefix in _FORMAT_BY_PREFIX if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _find_role(name: str) -> str | None:
    return next((role for role, pattern in _ROLE_SUFFIXES if pattern.search(name)), None)


def _parse_key(name: str) -> tuple[str, str | None, str]:
    """Family, kadr's name of the layer (None where there is no such), and role of a tensor; "" where it has none."""
    role = _find_role(name)
    if role is None:
        return NO_PREFIX, None, ""
    theirs = strip_role(name)
    family = next((family for prefix, family in _FORMAT_BY_PREFIX.items() if theirs.startswith(prefix)), NO_PREFIX)
    return family, _kadr_layer_name(strip_prefix(theirs)), role


def _kadr_layer_name(file_layer: str) -> str | None:
    """kadr's name of a layer, of one in any layout, with dots or underscores."""
    number = re.match(r"(?:transformer_blocks[._])(\d{1,4})[._]", file_layer)
    inside = file_layer if number is None else f"transformer_blocks.0.{file_layer[number.end() :]}"
    known = _kadr_linears().get(inside.replace(".", "_"))
    if known is None or number is None:
        return known
    return known.replace(f"{BLOCKS_PREFIX}0.", f"{BLOCKS_PREFIX}{int(number[1])}.", 1)


@cache
def _kadr_linears() -> dict[str, str]:
    """Their names of all layers that have a weight, with _ for every dot, of one block -> kadr's."""
    with torch.device("meta"):
        module = Transformer(TransformerConfig(num_layers=1, num_heads=1, head_dim=8))
    ours = [name for name, child in module.named_modules() if isinstance(child, Linear)]
    made: dict[str, str] = {}
    for diffusers in (False, True):
        table = map_keys(TRANSFORMER_KEYS, [f"{name}{WEIGHT_SUFFIX}" for name in ours], is_diffusers=diffusers)
        made |= {
            theirs.removesuffix(WEIGHT_SUFFIX).replace(".", "_"): our
            for our, theirs in zip(ours, table.values(), strict=True)
        }
    return made
