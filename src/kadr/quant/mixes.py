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

from kadr.kernels.ggml_types import PACKINGS

PLAIN = ("F32", "F16", "BF16")
SMALL = 1024  # numbers; a tensor of no more stays F32
# Where rows are no whole number of blocks of 256; as llama.cpp falls back.
FALLBACK: Mapping[str, str] = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}

VALUE, DOWN, EMBEDDING = "value", "down", "embedding"
_ROLES: Mapping[str, re.Pattern[str]] = {
    VALUE: re.compile(r"\.(to_v|attn_v)\.weight$"),
    DOWN: re.compile(r"\.(ff\.net\.2|ffn_down)\.weight$"),
    EMBEDDING: re.compile(r"^token_embd\.weight$"),
}
# Never in blocks: the first always in F32, the second as it is stored.
_EXACT = re.compile(r"scale_shift_table$|attn_rel_b\.weight$")
_KEPT = re.compile(r"(^|\.)(adaln_single|caption_projection|patchify_proj|proj_out)\.")

# Which of n tensors of a role: all; the first so many; the first n // so many; or those at both ends and every third.
EVERY, FIRST, SHARE, ENDS = "every", "first", "share", "ends"


@dataclass(frozen=True)
class More:
    """Some of the tensors of one role, and the type that they get."""

    type: str
    which: str = EVERY
    count: int = 0

    def holds(self, index: int, of: int) -> bool:
        """Whether the tensor of this index, of so many in the role, is among them."""
        if self.which == FIRST:
            return index < self.count
        if self.which == SHARE:
            return index < of // self.count
        if self.which == ENDS:
            return index < of // 8 or index >= 7 * of // 8 or (index - of // 8) % 3 == 2
        return True


Rules = Mapping[str, tuple[More, ...]]  # role -> the first that holds counts
_NONE: Rules = MappingProxyType({})


@dataclass(frozen=True)
class Mix:
    """What a user can ask for.

    Args:
        base: the type of most weights.
        file_type: its number in a GGUF file (llama.cpp's `llama_ftype`).
        transformer, text: what differs from the base.
    """

    name: str
    base: str
    file_type: int
    transformer: Rules = field(default_factory=lambda: _NONE)
    text: Rules = field(default_factory=lambda: _NONE)


def _k(name: str, file_type: int, transformer: Rules = _NONE, text: Rules = _NONE) -> Mix:
    words = {EMBEDDING: (More("Q6_K"),), **text}
    return Mix(name, name[:4], file_type, transformer, words)


_SIX = {VALUE: (More("Q6_K"),), DOWN: (More("Q6_K"),)}
_SIX_AT_ENDS = {VALUE: (More("Q6_K", ENDS),), DOWN: (More("Q6_K", ENDS),)}
_FIVE = {VALUE: (More("Q5_K"),), DOWN: (More("Q5_K"),)}
_VALUES_3M = (More("Q5_K", FIRST, 2), More("Q4_K"))
MIXES: Mapping[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", "F32", 0),
        Mix("F16", "F16", 1),
        Mix("BF16", "BF16", 32),
        Mix("Q8_0", "Q8_0", 7),
        _k("Q6_K", 18),
        _k("Q5_K_M", 17, _SIX, _SIX_AT_ENDS),
        _k("Q5_K_S", 16),
        Mix("Q5_1", "Q5_1", 9, text={EMBEDDING: (More("Q6_K"),)}),
        Mix("Q5_0", "Q5_0", 8, {DOWN: (More("Q5_1"),)}, {EMBEDDING: (More("Q6_K"),)}),
        _k("Q4_K_M", 15, _SIX, _SIX_AT_ENDS),
        _k(
            "Q4_K_S",
            14,
            {VALUE: (More("Q5_K", FIRST, 4),), DOWN: (More("Q5_K"),)},
            {VALUE: (More("Q5_K", FIRST, 4),), DOWN: (More("Q5_K", SHARE, 8),)},
        ),
        Mix("Q4_1", "Q4_1", 3, text={EMBEDDING: (More("Q6_K"),)}),
        Mix("Q4_0", "Q4_0", 2, {DOWN: (More("Q4_1"),)}, {EMBEDDING: (More("Q6_K"),)}),
        _k("Q3_K_L", 13, _FIVE, _FIVE),
        _k(
            "Q3_K_M",
            12,
            {VALUE: _VALUES_3M, DOWN: (More("Q4_K"),)},
            {VALUE: _VALUES_3M, DOWN: (More("Q5_K", SHARE, 16), More("Q4_K"))},
        ),
        _k("Q3_K_S", 11),
        _k("Q2_K", 10, {VALUE: (More("Q3_K"),)}, {VALUE: (More("Q3_K"),), DOWN: (More("Q3_K"),)}),
    )
}
SHORT: Mapping[str, str] = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
TYPES = (*MIXES, *SHORT)


def find_mix(name: str) -> Mix:
    """The mix of that name, in capitals or not.

    Raises:
        KeyError: there is none.
    """
    name = name.upper()
    return MIXES[SHORT.get(name, name)]


def assign_types(mix: Mix, rules: Rules, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, str]:
    """What each tensor is stored as.

    Args:
        rules: those of the mix, for a transformer or for a text encoder.
        tensors: name -> shape, and the one of `PLAIN` that it is kept as where it is not put into blocks; by layer.
    """
    made = {}
    members = {role: [name for name in tensors if pattern.search(name)] for role, pattern in _ROLES.items()}
    for name, (shape, kept) in tensors.items():
        if len(shape) < 2 or prod(shape) <= SMALL or _EXACT.search(name):
            made[name] = "F32"
        elif mix.base in PLAIN:
            made[name] = mix.base
        elif _KEPT.search(name):
            made[name] = kept
        else:
            wanted = mix.base
            for role, names in members.items():
                if name in names:
                    index = names.index(name)
                    wanted = next((more.type for more in rules.get(role, ()) if more.holds(index, len(names))), wanted)
            made[name] = _fitting(wanted, shape[-1], kept)
    return made


def _fitting(wanted: str, columns: int, kept: str) -> str:
    """The type, or the nearest one whose blocks rows of so many numbers fill."""
    candidates = (wanted, FALLBACK.get(wanted, wanted))
    return next((name for name in candidates if columns % PACKINGS[name].elements == 0), kept)
