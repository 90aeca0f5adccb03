"""What a header says of the weights of transformer blocks: where they are, and what they are stored as."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from kadr.checkpoints.header import FP8_DTYPES, TensorInfo
from kadr.checkpoints.source import Source

# What the names of the blocks begin with, in every layout; the number of the block follows.
BLOCK_PREFIXES = ("transformer_blocks.", "encoder.block.", "enc.blk.")


_RELATIVE_BIAS_NAMES = ("relative_attention_bias", "attn_rel_b")  # two-dimensional, inside a block, and no product


def block_index(name: str) -> int | None:
    """The number of the block that a tensor belongs to; None for what is around the blocks."""
    for start in BLOCK_PREFIXES:
        if name.startswith(start):
            return int(name[len(start) :].partition(".")[0])
    return None


def is_quantized(source: Source) -> bool:
    """Whether weights of blocks are stored in 8 bits or fewer already."""
    return any(
        info.ggml_type is not None or info.dtype in FP8_DTYPES
        for name, info in source.infos.items()
        if block_index(name) is not None
    )


def can_multiply_stored_fp8(source: Source) -> bool:
    """Whether all weights of blocks that are stored in fewer bits are the 8-bit floats that GPUs multiply."""
    blocks = (info for name, info in source.infos.items() if block_index(name) is not None)
    return all(info.ggml_type is None and info.dtype != torch.float8_e5m2 for info in blocks)


def count_stored_types(source: Source) -> Mapping[str, int]:
    """What the weights of the blocks are stored as, with how many of them are."""
    counts: dict[str, int] = defaultdict(int)
    for name, info in source.infos.items():
        if block_index(name) is not None and is_linear_weight(name, info):
            counts[info.storage_type] += 1
    return counts


def is_linear_weight(name: str, info: TensorInfo) -> bool:
    return name.endswith(".weight") and len(info.shape) == 2 and not any(word in name for word in _RELATIVE_BIAS_NAMES)
