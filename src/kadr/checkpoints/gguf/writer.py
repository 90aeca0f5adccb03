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

from kadr.checkpoints.header import EIGHT_BIT
from kadr.checkpoints.memory_map import release
from kadr.checkpoints.save import beside
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.quant.ggml import quantize

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 1 << 22  # numbers that are rounded at once
LARGEST = 65504.0  # that fits into float16, which the scales of blocks are stored in too
Watch = Callable[[int, int], object]


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Args:
        type: one of `DTYPES`, or a packing.
        read: gives the tensor in plain numbers, of any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]

    @property
    def row_bytes(self) -> int:
        if self.type in DTYPES:
            return self.shape[-1] * DTYPES[self.type].itemsize
        return GGML_TYPES[self.type].row_bytes(self.shape[-1])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    entries: Sequence[Entry],
    *,
    watch: Watch = lambda done, of: None,
) -> None:
    """Write a file beside its place, and put it there when it is whole.

    Args:
        fields: named values: text, truths, numbers, and lists of them.
        watch: called at the start and after each tensor with how many are written, and of how many.

    Raises:
        CheckpointError: there is no room, the file cannot be written, or a weight is not finite.
    """
    _require_room(path, sum(entry.bytes for entry in entries))
    writer = gguf.GGUFWriter(None, architecture)
    for name, value in fields.items():
        _add(writer, name, value)
    for entry in entries:
        shape = (*entry.shape[:-1], entry.row_bytes)
        kind = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), entry.bytes, kind)
    with beside(path) as part:
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            watch(0, len(entries))
            for done, entry in enumerate(entries, 1):
                writer.write_tensor_data(_stored(entry, path).numpy())
                watch(done, len(entries))
        finally:
            writer.close()


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
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


def _stored(entry: Entry, path: Path) -> Tensor:
    """The tensor as the file has it: uint8 (rows, bytes of a row)."""
    weight = entry.read()
    rows = weight.reshape(-1, weight.shape[-1])
    made = torch.empty(len(rows), entry.row_bytes, dtype=torch.uint8)
    step = max(1, PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        made[start : start + step] = _rounded(piece, entry, path)
        release([piece])
    return made


def _rounded(piece: Tensor, entry: Entry, path: Path) -> Tensor:
    numbers = piece.float() if piece.dtype in EIGHT_BIT else piece
    largest = max(abs(float(end)) for end in torch.aminmax(numbers))
    if not math.isfinite(largest):
        raise CheckpointError(
            f"the tensor {entry.name} has numbers that are not finite (NaN or infinity), so {path.name} is not "
            "written. The file it comes from is damaged: verify it, or download it again."
        )
    if entry.type not in ("F32", "BF16") and largest > LARGEST:
        raise CheckpointError(
            f"the tensor {entry.name} reaches {largest:g}, and {entry.type} holds no more than {LARGEST:g}. "
            "Take BF16 or F32."
        )
    if entry.type in GGML_TYPES:
        return quantize(numbers, GGML_TYPES[entry.type])
    return numbers.to(DTYPES[entry.type]).contiguous().view(torch.uint8)


def _require_room(path: Path, size: int) -> None:
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
