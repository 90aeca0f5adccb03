"""A GGUF file, written tensor by tensor: no more than one of them is in memory, and it is rounded in pieces."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from kadr.checkpoints.header import FP8_DTYPES
from kadr.checkpoints.memory_map import release_pages
from kadr.checkpoints.save import atomic_path
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.quant.ggml import quantize

UNQUANTIZED_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRITER_SLICE_ELEMENTS = 1 << 22  # numbers that are rounded at once
FP16_MAX = 65504.0  # that fits into float16, which the scales of blocks are stored in too
WriteWatch = Callable[[int, int], object]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Args:
        type_name: one of `UNQUANTIZED_DTYPES`, or a packing.
        read: gives the tensor in plain numbers, of any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    read: Callable[[], Tensor]

    @property
    def row_bytes(self) -> int:
        if self.type_name in UNQUANTIZED_DTYPES:
            return self.shape[-1] * UNQUANTIZED_DTYPES[self.type_name].itemsize
        return GGML_TYPES[self.type_name].row_bytes(self.shape[-1])

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Sequence[OutputTensor],
    *,
    watch: WriteWatch = lambda done, of: None,
) -> None:
    """Write a file beside its place, and put it there when it is whole.

    Args:
        fields: named values: text, truths, numbers, and lists of them.
        watch: called at the start and after each tensor with how many are written, and of how many.

    Raises:
        CheckpointError: there is no room, the file cannot be written, or a weight is not finite.
    """
    _check_disk_space(path, sum(entry.size_bytes for entry in tensors))
    writer = gguf.GGUFWriter(None, architecture)
    for name, value in fields.items():
        _add_field(writer, name, value)
    for entry in tensors:
        shape = (*entry.shape[:-1], entry.row_bytes)
        kind = gguf.GGMLQuantizationType[entry.type_name]
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), entry.size_bytes, kind)
    with atomic_path(path) as part:
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            watch(0, len(tensors))
            for done, entry in enumerate(tensors, 1):
                writer.write_tensor_data(_encode_tensor(entry, path).numpy())
                watch(done, len(tensors))
        finally:
            writer.close()


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _encode_tensor(tensor: OutputTensor, path: Path) -> Tensor:
    """The tensor as the file has it: uint8 (rows, bytes of a row)."""
    weight = tensor.read()
    rows = weight.reshape(-1, weight.shape[-1])
    made = torch.empty(len(rows), tensor.row_bytes, dtype=torch.uint8)
    step = max(1, WRITER_SLICE_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        made[start : start + step] = _encode_rows(piece, tensor, path)
        release_pages([piece])
    return made


def _encode_rows(rows: Tensor, tensor: OutputTensor, path: Path) -> Tensor:
    numbers = rows.float() if rows.dtype in FP8_DTYPES else rows
    largest = max(abs(float(end)) for end in torch.aminmax(numbers))
    if not math.isfinite(largest):
        raise CheckpointError(
            f"the tensor {tensor.name} has numbers that are not finite (NaN or infinity), so {path.name} is not "
            "written. The file it comes from is damaged: verify it, or download it again."
        )
    if tensor.type_name not in ("F32", "BF16") and largest > FP16_MAX:
        raise CheckpointError(
            f"the tensor {tensor.name} reaches {largest:g}, and {tensor.type_name} holds no more than {FP16_MAX:g}. "
            "Take BF16 or F32."
        )
    if tensor.type_name in GGML_TYPES:
        return quantize(numbers, GGML_TYPES[tensor.type_name])
    return numbers.to(UNQUANTIZED_DTYPES[tensor.type_name]).contiguous().view(torch.uint8)


def _check_disk_space(path: Path, size: int) -> None:
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path} cannot be written: there is no folder {path.parent}. Make it, or write elsewhere."
        )
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(
            f"{path} will take {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. Free some, or write it "
            "elsewhere."
        )
