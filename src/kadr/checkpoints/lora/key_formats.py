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

from kadr.checkpoints.keys import TRANSFORMER, names
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.nn.linear import Linear

LAYERS, WEIGHT = "layers.", ".weight"
PEFT, PLAIN = "PEFT", "plain"  # the last: names without any of these prefixes
_FAMILIES = {
    "base_model.model.": PEFT,
    "model.diffusion_model.": "Comfy",
    "diffusion_model.": "Comfy",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
}
# What the end of a name says that the tensor is. PEFT may put the name of the adapter in between: lora_A.default.
_ENDS = (
    ("down", re.compile(r"\.(lora_A(\.[^.]+)?|lora_down|lora\.down)\.weight$")),
    ("up", re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|lora\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)
# Ends of adapters in which a layer's product is another one. Without these tensors a file would run, and be wrong.
_OTHERS = (
    ("DoRA", re.compile(r"\.(dora_scale|lora_magnitude_vector(\.[^.]+)?(\.weight)?)$")),
    ("a LoRA with biases", re.compile(r"\.lora_B(\.[^.]+)?\.bias$")),
    ("LoCon with a matrix between", re.compile(r"\.lora_mid\.weight$")),
    ("LoHa", re.compile(r"\.hada_[wt][12](_[ab])?$")),
    ("LoKr", re.compile(r"\.lokr_[wt][12](_[ab])?$")),
)
_OF_LTX2 = re.compile(r"(^|[._])(audio_|av_ca_|video_to_audio|video_embeddings_connector|vocoder)")


@dataclass(frozen=True)
class Sorted:
    """The tensors of a file.

    Args:
        layers: kadr's name of a layer -> its tensors by role, "down", "up" and "alpha".
        strangers: names that are of no layer, or of one that another tensor is for already.
        family: that most names are of.
    """

    layers: Mapping[str, Mapping[str, str]]
    strangers: tuple[str, ...]
    family: str

    @classmethod
    def of(cls, tensors: Iterable[str]) -> Sorted:
        """From the names of all tensors of a file."""
        layers: dict[str, dict[str, str]] = {}
        strangers, families = [], dict[str, int]()
        for name in tensors:
            family, layer, role = _split(name)
            if layer is None or role in layers.get(layer, ()):
                strangers.append(name)
                continue
            layers.setdefault(layer, {})[role] = name
            families[family] = families.get(family, 0) + 1
        return cls(layers, tuple(strangers), max(families, key=families.__getitem__, default=PLAIN))


def is_half(name: str) -> bool:
    """Whether a tensor is of an adapter, of a kind that is read or not."""
    return _role(name) in ("down", "up") or other_kind(name) is not None


def other_kind(name: str) -> str | None:
    """The kind of adapter that a tensor is of, in words, where it is none of pairs of matrices alone."""
    return next((kind for kind, pattern in _OTHERS if pattern.search(name)), None)


def is_of_ltx2(name: str) -> bool:
    """Whether a tensor is of the layers for sound that LTX-2 has and this family has not."""
    return _OF_LTX2.search(name) is not None


def bare(name: str) -> str:
    """A tensor's name without its role: that of its layer, in the file's words."""
    for _, pattern in _ENDS:
        name = pattern.sub("", name)
    return name


def without_prefix(name: str) -> str:
    """A layer's name in the file's words, without what its family puts in front."""
    while prefix := next((prefix for prefix in _FAMILIES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _role(name: str) -> str | None:
    return next((role for role, pattern in _ENDS if pattern.search(name)), None)


def _split(name: str) -> tuple[str, str | None, str]:
    """Family, kadr's name of the layer (None where there is no such), and role of a tensor; "" where it has none."""
    role = _role(name)
    if role is None:
        return PLAIN, None, ""
    theirs = bare(name)
    family = next((family for prefix, family in _FAMILIES.items() if theirs.startswith(prefix)), PLAIN)
    return family, _ours(without_prefix(theirs)), role


def _ours(theirs: str) -> str | None:
    """kadr's name of a layer, of one in any layout, with dots or underscores."""
    number = re.match(r"(?:transformer_blocks[._])(\d{1,4})[._]", theirs)
    inside = theirs if number is None else f"transformer_blocks.0.{theirs[number.end() :]}"
    known = _linears().get(inside.replace(".", "_"))
    if known is None or number is None:
        return known
    return known.replace(f"{LAYERS}0.", f"{LAYERS}{int(number[1])}.", 1)


@cache
def _linears() -> dict[str, str]:
    """Their names of all layers that have a weight, with _ for every dot, of one block -> kadr's."""
    with torch.device("meta"):
        module = Transformer(TransformerConfig(num_layers=1, num_heads=1, head_dim=8))
    ours = [name for name, child in module.named_modules() if isinstance(child, Linear)]
    made: dict[str, str] = {}
    for diffusers in (False, True):
        table = names(TRANSFORMER, [f"{name}{WEIGHT}" for name in ours], diffusers=diffusers)
        made |= {
            theirs.removesuffix(WEIGHT).replace(".", "_"): our for our, theirs in zip(ours, table.values(), strict=True)
        }
    return made
