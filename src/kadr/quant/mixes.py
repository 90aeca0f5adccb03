"""GGUF quantization types that a user can name, and the type that each gives to each tensor. Does not import torch.

A type such as Q4_K_M is a mix: most weights in Q4_K, and those most sensitive to rounding in more bits. The mixes of a
transformer are those of the published GGUF files of this family (the rule for image models in city96's patch of
llama.cpp), those of a text encoder are llama.cpp's (`llama_tensor_get_type` in src/llama-quant.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

from kadr.kernels.ggml_types import GGML_TYPES

FLOAT_TYPES = ("F32", "F16", "BF16")
FP32_MAX_ELEMENTS = 1024  # a tensor of no more stays F32
# For rows that do not divide into blocks of 256; llama.cpp's fallbacks.
FALLBACK_TYPES: Mapping[str, str] = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}

ATTN_V, FFN_DOWN, TOKEN_EMBD = "value", "down", "embedding"
_ROLES: Mapping[str, re.Pattern[str]] = {
    ATTN_V: re.compile(r"\.(to_v|attn_v)\.weight$"),
    FFN_DOWN: re.compile(r"\.(ff\.net\.2|ffn_down)\.weight$"),
    TOKEN_EMBD: re.compile(r"^token_embd\.weight$"),
}
# Never quantized: the first is always F32, the second stays as stored.
_FP32_TENSORS = re.compile(r"scale_shift_table$|attn_rel_b\.weight$")
_UNQUANTIZED_TENSORS = re.compile(r"(^|\.)(adaln_single|caption_projection|patchify_proj|proj_out)\.")

# Which of the n tensors of a role: all; the first `count`; the first n // `count`; or those that llama.cpp's
# `use_more_bits` selects: the first and the last eighth, and every third between.
ALL, FIRST_COUNT, FIRST_FRACTION, USE_MORE_BITS = "all", "first_count", "first_fraction", "use_more_bits"


@dataclass(frozen=True)
class TypeOverride:
    """Type of some tensors of one role, instead of the base type of the mix."""

    type: str
    selection: str = ALL
    count: int = 0

    def applies_to(self, index: int, total: int) -> bool:
        """Returns whether it applies to the tensor with this index among the `total` tensors of the role."""
        if self.selection == FIRST_COUNT:
            return index < self.count
        if self.selection == FIRST_FRACTION:
            return index < total // self.count
        if self.selection == USE_MORE_BITS:
            return index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2
        return True


TypeOverrides = Mapping[str, tuple[TypeOverride, ...]]  # role -> overrides, of which the first that applies wins
_NO_OVERRIDES: TypeOverrides = MappingProxyType({})


@dataclass(frozen=True)
class Mix:
    """A quantization type that a user can name.

    Args:
        base_type: the type of most weights.
        file_type: its number in a GGUF file (llama.cpp's `llama_ftype`).
        transformer, text_encoder: overrides of the base type.
    """

    name: str
    base_type: str
    file_type: int
    transformer: TypeOverrides = field(default_factory=lambda: _NO_OVERRIDES)
    text_encoder: TypeOverrides = field(default_factory=lambda: _NO_OVERRIDES)


def _k_mix(
    name: str, file_type: int, transformer: TypeOverrides = _NO_OVERRIDES, text_encoder: TypeOverrides = _NO_OVERRIDES
) -> Mix:
    text_overrides = {TOKEN_EMBD: (TypeOverride("Q6_K"),), **text_encoder}
    return Mix(name, name[:4], file_type, transformer, text_overrides)


_VALUE_DOWN_Q6 = {ATTN_V: (TypeOverride("Q6_K"),), FFN_DOWN: (TypeOverride("Q6_K"),)}
_VALUE_DOWN_Q6_MORE_BITS = {
    ATTN_V: (TypeOverride("Q6_K", USE_MORE_BITS),),
    FFN_DOWN: (TypeOverride("Q6_K", USE_MORE_BITS),),
}
_VALUE_DOWN_Q5 = {ATTN_V: (TypeOverride("Q5_K"),), FFN_DOWN: (TypeOverride("Q5_K"),)}
_VALUE_Q3_K_M = (TypeOverride("Q5_K", FIRST_COUNT, 2), TypeOverride("Q4_K"))
MIXES: Mapping[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", "F32", 0),
        Mix("F16", "F16", 1),
        Mix("BF16", "BF16", 32),
        Mix("Q8_0", "Q8_0", 7),
        _k_mix("Q6_K", 18),
        _k_mix("Q5_K_M", 17, _VALUE_DOWN_Q6, _VALUE_DOWN_Q6_MORE_BITS),
        _k_mix("Q5_K_S", 16),
        Mix("Q5_1", "Q5_1", 9, text_encoder={TOKEN_EMBD: (TypeOverride("Q6_K"),)}),
        Mix("Q5_0", "Q5_0", 8, {FFN_DOWN: (TypeOverride("Q5_1"),)}, {TOKEN_EMBD: (TypeOverride("Q6_K"),)}),
        _k_mix("Q4_K_M", 15, _VALUE_DOWN_Q6, _VALUE_DOWN_Q6_MORE_BITS),
        _k_mix(
            "Q4_K_S",
            14,
            {ATTN_V: (TypeOverride("Q5_K", FIRST_COUNT, 4),), FFN_DOWN: (TypeOverride("Q5_K"),)},
            {ATTN_V: (TypeOverride("Q5_K", FIRST_COUNT, 4),), FFN_DOWN: (TypeOverride("Q5_K", FIRST_FRACTION, 8),)},
        ),
        Mix("Q4_1", "Q4_1", 3, text_encoder={TOKEN_EMBD: (TypeOverride("Q6_K"),)}),
        Mix("Q4_0", "Q4_0", 2, {FFN_DOWN: (TypeOverride("Q4_1"),)}, {TOKEN_EMBD: (TypeOverride("Q6_K"),)}),
        _k_mix("Q3_K_L", 13, _VALUE_DOWN_Q5, _VALUE_DOWN_Q5),
        _k_mix(
            "Q3_K_M",
            12,
            {ATTN_V: _VALUE_Q3_K_M, FFN_DOWN: (TypeOverride("Q4_K"),)},
            {ATTN_V: _VALUE_Q3_K_M, FFN_DOWN: (TypeOverride("Q5_K", FIRST_FRACTION, 16), TypeOverride("Q4_K"))},
        ),
        _k_mix("Q3_K_S", 11),
        _k_mix(
            "Q2_K",
            10,
            {ATTN_V: (TypeOverride("Q3_K"),)},
            {ATTN_V: (TypeOverride("Q3_K"),), FFN_DOWN: (TypeOverride("Q3_K"),)},
        ),
    )
}
MIX_ALIASES: Mapping[str, str] = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
MIX_NAMES = (*MIXES, *MIX_ALIASES)


def find_mix(name: str) -> Mix:
    """Returns the mix of that name, in any case of letters.

    Raises:
        KeyError: there is none.
    """
    name = name.upper()
    return MIXES[MIX_ALIASES.get(name, name)]


def assign_types(
    mix: Mix, overrides: TypeOverrides, tensors: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, str]:
    """Returns the GGUF type of each tensor.

    Args:
        overrides: those of the mix for a transformer, or for a text encoder.
        tensors: name -> (shape, the one of `FLOAT_TYPES` that it has if it is not quantized), in order of layers.
    """
    types = {}
    members = {role: [name for name in tensors if pattern.search(name)] for role, pattern in _ROLES.items()}
    for name, (shape, unquantized_type) in tensors.items():
        if len(shape) < 2 or prod(shape) <= FP32_MAX_ELEMENTS or _FP32_TENSORS.search(name):
            types[name] = "F32"
        elif mix.base_type in FLOAT_TYPES:
            types[name] = mix.base_type
        elif _UNQUANTIZED_TENSORS.search(name):
            types[name] = unquantized_type
        else:
            type_name = mix.base_type
            for role, names in members.items():
                if name in names:
                    index = names.index(name)
                    type_name = next(
                        (
                            override.type
                            for override in overrides.get(role, ())
                            if override.applies_to(index, len(names))
                        ),
                        type_name,
                    )
            types[name] = _type_for_columns(type_name, shape[-1], unquantized_type)
    return types


def _type_for_columns(type_name: str, columns: int, unquantized_type: str) -> str:
    """Returns the type, or its fallback, if its blocks divide rows of `columns` elements; else `unquantized_type`."""
    candidates = (type_name, FALLBACK_TYPES.get(type_name, type_name))
    return next((name for name in candidates if columns % GGML_TYPES[name].block_size == 0), unquantized_type)
