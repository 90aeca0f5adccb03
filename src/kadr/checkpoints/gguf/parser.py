"""The bytes that a GGUF file begins with, taken apart.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): counts, named values, then name, shape, type and
place of every tensor, and their bytes from the next multiple of the alignment on. The gguf package reads it too, but
makes an array of each entry of a list: with the vocabulary of T5 that takes seconds, and here it is stepped over.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
# Kinds of values: those that are one number, and how `struct` calls it.
_STRUCT_CODES: Mapping[int, str] = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DIMS, _MAX_ENTRIES = 8, 1 << 20  # more are a sign of damage


@dataclass(frozen=True)
class ArraySpan:
    """A list that was stepped over: so many entries of a kind, in these bytes of the file."""

    value_type: int
    length: int
    start: int
    end: int


class GGUFTensorInfo(NamedTuple):
    """A tensor as the file lists it. kind: the number of its GGML type. offset: from the start of all tensors."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class GGUFParser:
    """Takes one thing after another out of a file, from its version on.

    Raises:
        struct.error: the file ends before.
        ValueError: what stands there cannot be.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, len(MAGIC)

    def read_number(self, struct_code: str) -> Any:
        (value,) = struct.unpack_from(f"<{struct_code}", self.data, self.position)
        self.position += struct.calcsize(f"<{struct_code}")
        return value

    def read_string(self) -> str:
        size = self.read_number("Q")
        self.skip(size)
        return self.data[self.position - size : self.position].decode(errors="replace")

    def skip(self, size: int) -> None:
        self._require_bytes(size)
        self.position += size

    def read_counts(self) -> tuple[int, int]:
        """Of tensors and of values."""
        tensors, values = self.read_number("Q"), self.read_number("Q")
        if max(tensors, values) > _MAX_ENTRIES:
            raise ValueError(f"it promises {tensors} tensors and {values} values")
        return tensors, values

    def read_field(self) -> tuple[str, Any]:
        """A named value; a list is a `ArraySpan`."""
        return self.read_string(), self._read_value()

    def read_tensor_info(self) -> GGUFTensorInfo:
        """A tensor of the list behind the values."""
        name, axes = self.read_string(), self.read_number("I")
        if axes > _MAX_DIMS:
            raise ValueError(f"its tensor {name} has {axes} axes")
        shape = tuple(self.read_number("Q") for _ in range(axes))[::-1]  # GGML counts them from the innermost
        return GGUFTensorInfo(name, shape, self.read_number("I"), self.read_number("Q"))

    def compute_data_offset(self, alignment: Any) -> int:
        """Where the bytes of the tensors start."""
        if alignment not in (2**power for power in range(17)):
            raise ValueError(f"its tensors are aligned to {alignment!r} bytes, which is no power of two")
        return -(-self.position // alignment) * alignment

    def _read_value(self) -> Any:
        kind = self.read_number("I")
        if kind == _STRING:
            return self.read_string()
        if kind == _ARRAY:
            return self._skip_array()
        value = self.read_number(_struct_code(kind))
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-6, not the nearest sum of powers of 2

    def _skip_array(self) -> ArraySpan:
        kind, count = self.read_number("I"), self.read_number("Q")
        start = self.position
        if kind == _STRING:
            self._require_bytes(count * struct.calcsize("<Q"))
            for _ in range(count):
                self.skip(self.read_number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{_struct_code(kind)}"))
        return ArraySpan(kind, count, start, self.position)

    def _require_bytes(self, size: int) -> None:
        if self.position + size > len(self.data):
            raise struct.error(f"{size} bytes from {self.position} on are past the end")


def decode_array(raw: bytes, span: ArraySpan) -> Sequence[Any]:
    """What a list holds: bytes where they are bytes. raw: the bytes that it takes."""
    if span.value_type == _STRING:
        texts, place = [], 0
        for _ in range(span.length):
            (size,) = struct.unpack_from("<Q", raw, place)
            place += struct.calcsize("<Q") + size
            texts.append(raw[place - size : place].decode(errors="replace"))
        return texts
    code = _STRUCT_CODES[span.value_type]
    return raw if code in "Bb" else struct.unpack(f"<{span.length}{code}", raw)


def _struct_code(value_type: int) -> str:
    if value_type not in _STRUCT_CODES:
        raise ValueError(f"a value is of kind {value_type}, which does not exist")
    return _STRUCT_CODES[value_type]
