"""Key formats of LoRA files: matches each tensor to a layer of the transformer.

Key formats, for a layer m such as transformer_blocks.7.attn1.to_q:

    diffusers   transformer.m.lora_A.weight                   as diffusers saves them, and trainers for it
    Comfy       diffusion_model.m.lora_A.weight               Lightricks' own releases
    PEFT        base_model.model.m.lora_A.weight              beside an adapter_config.json
    kohya       lora_unet_m.lora_down.weight, ....alpha       with _ for every dot of m, or with the dots
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
PEFT, NO_PREFIX = "PEFT", "plain"  # key formats; "plain": keys without any of these prefixes
_FORMAT_BY_PREFIX = {
    "base_model.model.": PEFT,
    "model.diffusion_model.": "Comfy",
    "diffusion_model.": "Comfy",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
}
# Role of a tensor by the suffix of its key. PEFT may put the adapter's name in between: lora_A.default.
_ROLE_SUFFIXES = (
    ("down", re.compile(r"\.(lora_A(\.[^.]+)?|lora_down|lora\.down)\.weight$")),
    ("up", re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|lora\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)
# Suffixes of adapters that change a layer in another way. Without these tensors a file would run, with wrong results.
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
    """The keys of a LoRA file, matched to layers.

    Args:
        layers: kadr's name of a layer -> its keys by role, "down", "up" and "alpha".
        unexpected_keys: keys that match no layer, or a layer and role that another key has already.
        key_format: the format of most keys.
    """

    layers: Mapping[str, Mapping[str, str]]
    unexpected_keys: tuple[str, ...]
    key_format: str

    @classmethod
    def parse(cls, keys: Iterable[str]) -> LoraKeys:
        """Matches all keys of a file to layers."""
        layers: dict[str, dict[str, str]] = {}
        unexpected, format_counts = [], dict[str, int]()
        for key in keys:
            key_format, layer, role = _parse_key(key)
            if layer is None or role in layers.get(layer, ()):
                unexpected.append(key)
                continue
            layers.setdefault(layer, {})[role] = key
            format_counts[key_format] = format_counts.get(key_format, 0) + 1
        return cls(layers, tuple(unexpected), max(format_counts, key=format_counts.__getitem__, default=NO_PREFIX))


def is_adapter_key(key: str) -> bool:
    """Returns whether a key is an adapter's, of a supported kind or not."""
    return _find_role(key) in ("down", "up") or unsupported_adapter_kind(key) is not None


def unsupported_adapter_kind(key: str) -> str | None:
    """Returns the kind of adapter that a key belongs to, if it is more than pairs of matrices; else None."""
    return next((kind for kind, pattern in _UNSUPPORTED_ADAPTERS if pattern.search(key)), None)


def is_ltx2_key(key: str) -> bool:
    """Returns whether a key is one of LTX-2's audio layers, which this family does not have."""
    return _LTX2_LAYER.search(key) is not None


def strip_role(key: str) -> str:
    """Returns a key without its role suffix: the layer's name in the file."""
    for _, pattern in _ROLE_SUFFIXES:
        key = pattern.sub("", key)
    return key


def strip_prefix(name: str) -> str:
    """Returns a layer's name in the file without the prefixes of its key format."""
    while prefix := next((prefix for prefix in _FORMAT_BY_PREFIX if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _find_role(key: str) -> str | None:
    return next((role for role, pattern in _ROLE_SUFFIXES if pattern.search(key)), None)


def _parse_key(key: str) -> tuple[str, str | None, str]:
    """Returns a key's format, kadr's name of its layer (None if it has none), and its role ("" if it has none)."""
    role = _find_role(key)
    if role is None:
        return NO_PREFIX, None, ""
    layer = strip_role(key)
    key_format = next((name for prefix, name in _FORMAT_BY_PREFIX.items() if layer.startswith(prefix)), NO_PREFIX)
    return key_format, _kadr_layer_name(strip_prefix(layer)), role


def _kadr_layer_name(file_layer: str) -> str | None:
    """Returns kadr's name of a layer named in either layout, with dots or underscores; None if there is none."""
    block = re.match(r"(?:transformer_blocks[._])(\d{1,4})[._]", file_layer)
    in_block_0 = file_layer if block is None else f"transformer_blocks.0.{file_layer[block.end() :]}"
    kadr_name = _kadr_linears().get(in_block_0.replace(".", "_"))
    if kadr_name is None or block is None:
        return kadr_name
    return kadr_name.replace(f"{BLOCKS_PREFIX}0.", f"{BLOCKS_PREFIX}{int(block[1])}.", 1)


@cache
def _kadr_linears() -> dict[str, str]:
    """Returns file name (with _ for every dot) -> kadr's name, for all linear layers of a one-block transformer."""
    with torch.device("meta"):
        module = Transformer(TransformerConfig(num_layers=1, num_heads=1, head_dim=8))
    kadr_names = [name for name, child in module.named_modules() if isinstance(child, Linear)]
    kadr_name_by_file_name: dict[str, str] = {}
    for is_diffusers in (False, True):
        key_map = map_keys(
            TRANSFORMER_KEYS, [f"{name}{WEIGHT_SUFFIX}" for name in kadr_names], is_diffusers=is_diffusers
        )
        kadr_name_by_file_name |= {
            file_key.removesuffix(WEIGHT_SUFFIX).replace(".", "_"): kadr_name
            for kadr_name, file_key in zip(kadr_names, key_map.values(), strict=True)
        }
    return kadr_name_by_file_name
