"""Bytes that the weights of a component take in memory, from its header and how they are held."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.source import Source
from kadr.planning.plan import AS_STORED, CONVERTED
from kadr.quant.convert import ggml_type_for
from kadr.quant.prepack import WINOGRAD_BYTES_RATIO
from kadr.quant.weight_formats import EIGHT_BIT_FORMATS
from kadr.spec.weights import block_index, is_linear_weight

EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight")


EMBEDDING_LOOKUP_BYTES = (
    20_000_000  # bytes of an embedding's rows that the tokens of a prompt touch, in whole pages read around
)


@dataclass(frozen=True)
class WeightBytes:
    """The bytes of a part's weights in memory.

    Args:
        mapped: in the pages of files.
        private: others.
        largest_mapped_block: of `mapped`, what the largest block has.
        mapped_blocks: of `mapped`, what all blocks have.
        all_blocks_total: of both, what all blocks have.
        num_blocks: how many blocks.
        scratch: the largest weight, unpacked; what is made while one weight is changed.
    """

    mapped: int
    private: int
    largest_mapped_block: int = 0
    mapped_blocks: int = 0
    all_blocks_total: int = 0
    num_blocks: int = 0
    scratch: int = 0


def weight_bytes(
    source: Source,
    dtype: torch.dtype,
    weight_format: str,
    *,
    is_text_encoder: bool = False,
    is_prepacked: bool = False,
    winograd_frames: int = 0,
) -> WeightBytes:
    """The bytes of a component held in some way.

    Args:
        weight_format: see `planning.plan.Choice`.
        is_prepacked: matrices are packed once they are loaded; see `quant.prepack`.
        winograd_frames: so are convolutions, for so many frames at a time; 0 where they are not.
        is_text_encoder: the component is a text encoder, of whose embedding only some rows are read.
    """
    mapped, own, scratch, everything = 0, 0, 0, 0
    blocks: dict[int, int] = defaultdict(int)
    for name, info in source.infos.items():
        number = block_index(name)
        taken, made = _tensor_bytes(name, info, dtype, weight_format, number)
        if weight_format == CONVERTED and info.ggml_type is None and name.endswith(".weight"):
            if winograd_frames and len(info.shape) == 5:
                taken, made = 0, int(info.numel * dtype.itemsize * WINOGRAD_BYTES_RATIO[winograd_frames])
            elif is_prepacked and len(info.shape) == 2:
                taken, made = 0, info.numel * dtype.itemsize
        if is_text_encoder and name in EMBEDDING_NAMES and not made:
            taken = min(taken, EMBEDDING_LOOKUP_BYTES)
        mapped, own = mapped + taken, own + made
        if number is not None:
            blocks[number] += taken
            everything += taken + made
            if is_linear_weight(name, info) and info.storage_type != _dtype_name(dtype):
                scratch = max(scratch, info.numel * dtype.itemsize)
    largest = max(blocks.values(), default=0)
    return WeightBytes(mapped, own, largest, sum(blocks.values()), everything, len(blocks), scratch)


def _tensor_bytes(
    name: str, info: TensorInfo, dtype: torch.dtype, weight_format: str, block: int | None
) -> tuple[int, int]:
    """Bytes of one tensor in mapped pages, and of the process's own."""
    in_block = block is not None and is_linear_weight(name, info)
    if in_block and weight_format not in (AS_STORED, CONVERTED):
        return 0, _quantized_bytes(info, weight_format)
    if info.storage_type == _dtype_name(dtype):
        return info.size_bytes, 0
    if info.ggml_type is not None and name.endswith(".weight") and len(info.shape) == 2:
        return info.size_bytes, 0
    if in_block and weight_format == AS_STORED:
        return info.size_bytes, 0
    return 0, info.numel * dtype.itemsize


def _quantized_bytes(info: TensorInfo, scheme: str) -> int:
    rows, columns = info.shape
    if scheme in EIGHT_BIT_FORMATS:
        return rows * (columns + 4)
    return rows * ggml_type_for(scheme, columns).row_bytes(columns)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
