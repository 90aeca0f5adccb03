"""Storage types of the weights of transformer blocks, from the header."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from kadr.checkpoints.header import FP8_DTYPES, TensorInfo
from kadr.checkpoints.source import Source
from kadr.memory.device import can_hold

# Key prefixes of the blocks in every layout; the index of the block follows.
BLOCK_PREFIXES = ("transformer_blocks.", "encoder.block.", "enc.blk.")
_RELATIVE_BIAS_NAMES = ("relative_attention_bias", "attn_rel_b")  # two-dimensional, in a block, and not a linear layer


def block_index(name: str) -> int | None:
    """Returns the index of the block that a tensor belongs to; None for tensors around the blocks."""
    for prefix in BLOCK_PREFIXES:
        if name.startswith(prefix):
            return int(name[len(prefix) :].partition(".")[0])
    return None


def is_quantized(source: Source) -> bool:
    """Returns whether weights of blocks are stored in 8 bits or fewer."""
    return any(
        info.ggml_type is not None or info.dtype in FP8_DTYPES
        for name, info in source.infos.items()
        if block_index(name) is not None
    )


def can_stay_stored(source: Source, device: torch.device) -> bool:
    """Returns whether a device can hold the weights of the blocks as they are stored."""
    return all(can_hold(device, info.dtype) for name, info in source.infos.items() if block_index(name) is not None)


def can_multiply_stored_fp8(source: Source) -> bool:
    """Returns whether all quantized weights of blocks are in the fp8 dtype that GPUs multiply (float8_e4m3fn)."""
    blocks = (info for name, info in source.infos.items() if block_index(name) is not None)
    return all(info.ggml_type is None and info.dtype != torch.float8_e5m2 for info in blocks)


def count_stored_types(source: Source) -> Mapping[str, int]:
    """Returns storage type -> number of linear weights in the blocks."""
    counts: dict[str, int] = defaultdict(int)
    for name, info in source.infos.items():
        if block_index(name) is not None and is_linear_weight(name, info):
            counts[info.storage_type] += 1
    return counts


def is_linear_weight(name: str, info: TensorInfo) -> bool:
    """Returns whether a tensor is the weight of a linear layer."""
    return name.endswith(".weight") and len(info.shape) == 2 and not any(word in name for word in _RELATIVE_BIAS_NAMES)
