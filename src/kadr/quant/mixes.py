"""What each tensor of a GGUF file is stored as: the types a user can name, and the mixes behind them. No torch.

A type such as Q4_K_M is a mix: most weights in Q4_K, and those that suffer most from rounding in more bits. A
transformer is mixed as the published GGUF files of this family are (the rule for image models in city96's patch of
llama.cpp), a text encoder as llama.cpp does it (`llama_tensor_get_type` in src/llama-quant.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

from kadr.kernels.ggml_types import GGML_TYPES

FLOAT_TYPES = ("F32", "F16", "BF16")
FP32_MAX_ELEMENTS = 1024  # numbers; a tensor of no more stays F32
# Where rows are no whole number of blocks of 256; as llama.cpp falls back.
FALLBACK_TYPES: Mapping[str, str] = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}

ATTN_V, FFN_DOWN, TOKEN_EMBD = "value", "down", "embedding"
_ROLES: Mapping[str, re.Pattern[str]] = {
    ATTN_V: re.compile(r"\.(to_v|attn_v)\.weight$"),
    FFN_DOWN: re.compile(r"\.(ff\.net\.2|ffn_down)\.weight$"),
    TOKEN_EMBD: re.compile(r"^token_embd\.weight$"),
}
# Never in blocks: the first always in F32, the second as it is stored.
_FP32_TENSORS = re.compile(r"scale_shift_table$|attn_rel_b\.weight$")
_UNQUANTIZED_TENSORS = re.compile(r"(^|\.)(adaln_single|caption_projection|patchify_proj|proj_out)\.")

# Which of n tensors of a role: all; the first so many; the first n // so many; or those at both ends and every third.
ALL, FIRST_COUNT, FIRST_FRACTION, USE_MORE_BITS = "every", "first", "share", "ends"


@dataclass(frozen=True)
class TypeOverride:
    """Some of the tensors of one role, and the type that they get."""

    type: str
    selection: str = ALL
    count: int = 0

    def applies_to(self, index: int, total: int) -> bool:
        """Whether the tensor of this index, of so many in the role, is among them."""
        if self.selection == FIRST_COUNT:
            return index < self.count
        if self.selection == FIRST_FRACTION:
            return index < total // self.count
        if self.selection == USE_MORE_BITS:
            return index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2
        return True


TypeOverrides = Mapping[str, tuple[TypeOverride, ...]]  # role -> the first that holds counts
_NO_OVERRIDES: TypeOverrides = MappingProxyType({})


@dataclass(frozen=True)
class Mix:
    """What a user can ask for.

    Args:
        base_type: the type of most weights.
        file_type: its number in a GGUF file (llama.cpp's `llama_ftype`).
        transformer, text_encoder: what differs from the base.
    """

    name: str
    base_type: str
    file_type: int
    transformer: TypeOverrides = field(default_factory=lambda: _NO_OVERRIDES)
    text_encoder: TypeOverrides = field(default_factory=lambda: _NO_OVERRIDES)


def _k_mix(
    name: str, file_type: int, transformer: TypeOverrides = _NO_OVERRIDES, text_encoder: TypeOverrides = _NO_OVERRIDES
) -> Mix:
    words = {TOKEN_EMBD: (TypeOverride("Q6_K"),), **text_encoder}
    return Mix(name, name[:4], file_type, transformer, words)


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
    """The mix of that name, in capitals or not.

    Raises:
        KeyError: there is none.
    """
    name = name.upper()
    return MIXES[MIX_ALIASES.get(name, name)]


def assign_types(
    mix: Mix, overrides: TypeOverrides, tensors: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, str]:
    """What each tensor is stored as.

    Args:
        overrides: those of the mix, for a transformer or for a text encoder.
        tensors: name -> shape, and the one of `FLOAT_TYPES` that it is kept as where it is not put into blocks; by layer.
    """
    made = {}
    members = {role: [name for name in tensors if pattern.search(name)] for role, pattern in _ROLES.items()}
    for name, (shape, kept) in tensors.items():
        if len(shape) < 2 or prod(shape) <= FP32_MAX_ELEMENTS or _FP32_TENSORS.search(name):
            made[name] = "F32"
        elif mix.base_type in FLOAT_TYPES:
            made[name] = mix.base_type
        elif _UNQUANTIZED_TENSORS.search(name):
            made[name] = kept
        else:
            wanted = mix.base_type
            for role, names in members.items():
                if name in names:
                    index = names.index(name)
                    wanted = next(
                        (more.type for more in overrides.get(role, ()) if more.applies_to(index, len(names))), wanted
                    )
            made[name] = _type_for_columns(wanted, shape[-1], kept)
    return made


def _type_for_columns(type_name: str, columns: int, unquantized_type: str) -> str:
    """The type, or the nearest one whose blocks rows of so many numbers fill."""
    candidates = (type_name, FALLBACK_TYPES.get(type_name, type_name))
    return next((name for name in candidates if columns % GGML_TYPES[name].block_size == 0), unquantized_type)
