"""Bytes that the weights of a component take in memory, from its header and its weight format."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.source import Source
from kadr.planning.placement import AS_STORED, CONVERTED
from kadr.quant.convert import ggml_type_for
from kadr.quant.prepack import WINOGRAD_BYTES_RATIO
from kadr.quant.weight_formats import EIGHT_BIT_FORMATS
from kadr.spec.weights import block_index, is_linear_weight

EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight")
# Bytes of the embedding rows that the tokens of a prompt touch, in whole pages with read-ahead.
EMBEDDING_LOOKUP_BYTES = 20_000_000


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a component's weights in memory.

    Args:
        mapped: bytes in mapped pages of files.
        private: all other bytes.
        largest_mapped_block: bytes of `mapped` in the largest block.
        mapped_blocks: bytes of `mapped` in all blocks.
        all_blocks_total: bytes of `mapped` and `private` in all blocks.
        num_blocks: number of blocks.
        scratch: bytes of the largest weight after dequantization, the buffer of the layer that runs.
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
    """Returns the bytes of a component's weights in a weight format.

    Args:
        weight_format: see `planning.placement.Placement`.
        is_text_encoder: the component is a text encoder, of whose embedding only some rows are read.
        is_prepacked: linear weights are prepacked after loading; see `quant.prepack`.
        winograd_frames: frames that prepacked convolutions compute at a time; 0 if convolutions are not prepacked.
    """
    mapped, private, scratch, all_blocks_total = 0, 0, 0, 0
    mapped_by_block: dict[int, int] = defaultdict(int)
    for name, info in source.infos.items():
        block = block_index(name)
        tensor_mapped, tensor_private = _tensor_bytes(name, info, dtype, weight_format, block)
        if weight_format == CONVERTED and info.ggml_type is None and name.endswith(".weight"):
            if winograd_frames and len(info.shape) == 5:
                tensor_private = int(info.numel * dtype.itemsize * WINOGRAD_BYTES_RATIO[winograd_frames])
                tensor_mapped = 0
            elif is_prepacked and len(info.shape) == 2:
                tensor_mapped, tensor_private = 0, info.numel * dtype.itemsize
        if is_text_encoder and name in EMBEDDING_NAMES and not tensor_private:
            tensor_mapped = min(tensor_mapped, EMBEDDING_LOOKUP_BYTES)
        mapped, private = mapped + tensor_mapped, private + tensor_private
        if block is not None:
            mapped_by_block[block] += tensor_mapped
            all_blocks_total += tensor_mapped + tensor_private
            if is_linear_weight(name, info) and info.storage_type != _dtype_name(dtype):
                scratch = max(scratch, info.numel * dtype.itemsize)
    return WeightBytes(
        mapped=mapped,
        private=private,
        largest_mapped_block=max(mapped_by_block.values(), default=0),
        mapped_blocks=sum(mapped_by_block.values()),
        all_blocks_total=all_blocks_total,
        num_blocks=len(mapped_by_block),
        scratch=scratch,
    )


def _tensor_bytes(
    name: str, info: TensorInfo, dtype: torch.dtype, weight_format: str, block: int | None
) -> tuple[int, int]:
    """Returns the mapped and the private bytes of one tensor."""
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


def _quantized_bytes(info: TensorInfo, weight_format: str) -> int:
    rows, columns = info.shape
    if weight_format in EIGHT_BIT_FORMATS:
        return rows * (columns + 4)
    return rows * ggml_type_for(weight_format, columns).row_bytes(columns)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
