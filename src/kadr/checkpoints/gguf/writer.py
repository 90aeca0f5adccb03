"""Writes a GGUF file tensor by tensor: one at a time in memory, quantized in slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from kadr.atomic_write import atomic_path
from kadr.cancellation import cancellable, check_cancelled
from kadr.checkpoints.header import FP8_DTYPES
from kadr.checkpoints.save import check_disk_space
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.memory.mapped_files import release_pages
from kadr.quant.ggml import quantize

UNQUANTIZED_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRITER_SLICE_ELEMENTS = 1 << 22  # elements that are quantized at once
FP16_MAX = 65504.0  # the scales of blocks are float16 too
WriteWatch = Callable[[int, int], object]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Args:
        type_name: one of `UNQUANTIZED_DTYPES` or of `GGML_TYPES`.
        read: returns the unquantized tensor, of any float dtype.
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
    """Writes a GGUF file, which takes its name only when it is complete.

    Args:
        fields: name -> string, boolean, number, or a sequence of these.
        watch: called at the start and after each tensor with the numbers of tensors written and in all.

    Raises:
        CheckpointError: the disk is full, the file cannot be written, or a weight is not finite.
        Cancelled: the current token is cancelled; looked at before each slice of a tensor.
    """
    check_disk_space(path, sum(entry.size_bytes for entry in tensors))
    writer = gguf.GGUFWriter(None, architecture)
    for name, value in fields.items():
        _add_field(writer, name, value)
    for entry in tensors:
        shape = (*entry.shape[:-1], entry.row_bytes)
        ggml_type = gguf.GGMLQuantizationType[entry.type_name]
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), entry.size_bytes, ggml_type)
    with cancellable(), atomic_path(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
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
    """Encodes a tensor as uint8 (rows, bytes of a row)."""
    weight = tensor.read()
    rows = weight.reshape(-1, weight.shape[-1])
    encoded = torch.empty(len(rows), tensor.row_bytes, dtype=torch.uint8)
    step = max(1, WRITER_SLICE_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        check_cancelled()
        row_slice = rows[start : start + step]
        encoded[start : start + step] = _encode_rows(row_slice, tensor, path)
        release_pages([row_slice])
    return encoded


def _encode_rows(rows: Tensor, tensor: OutputTensor, path: Path) -> Tensor:
    values = rows.float() if rows.dtype in FP8_DTYPES else rows
    abs_max = max(abs(float(bound)) for bound in torch.aminmax(values))
    if not math.isfinite(abs_max):
        raise CheckpointError(
            f"the tensor {tensor.name} has values that are not finite (NaN or infinity), so {path.name} is not "
            "written. Its source is damaged: verify it, or download it again."
        )
    if tensor.type_name not in ("F32", "BF16") and abs_max > FP16_MAX:
        raise CheckpointError(
            f"the tensor {tensor.name} reaches {abs_max:g}; the maximum of {tensor.type_name} is {FP16_MAX:g}. "
            "Use BF16 or F32."
        )
    if tensor.type_name in GGML_TYPES:
        return quantize(values, GGML_TYPES[tensor.type_name])
    return values.to(UNQUANTIZED_DTYPES[tensor.type_name]).contiguous().view(torch.uint8)
