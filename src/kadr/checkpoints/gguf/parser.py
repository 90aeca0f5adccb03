"""Parses the header bytes of a GGUF file.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): counts, key-value fields, then name, shape, type
and offset of every tensor, and their bytes from the next multiple of the alignment on. The gguf package reads it too,
but makes a numpy array of each entry of an array: seconds, with the vocabulary of T5. This parser skips arrays.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kadr.quoting import quote

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
# GGUF value type of a number -> its `struct` code.
_STRUCT_CODES: Mapping[int, str] = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DIMS, _MAX_ENTRIES, _MAX_STRINGS = 8, 1 << 16, 1 << 20  # more are a sign of damage; T5 has 32,128 strings


@dataclass(frozen=True)
class ArraySpan:
    """An array that the parser skipped: value type, length, and first and last byte in the file."""

    value_type: int
    length: int
    start: int
    end: int


class GGUFTensorInfo(NamedTuple):
    """A tensor as the file lists it, with the id of its GGML type and its offset from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class GGUFParser:
    """Reads a file sequentially, from its version on.

    Raises:
        struct.error: the file ends too early.
        ValueError: a value is invalid.
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
        """Reads the numbers of tensors and of fields."""
        num_tensors, num_fields = self.read_number("Q"), self.read_number("Q")
        if max(num_tensors, num_fields) > _MAX_ENTRIES:
            raise ValueError(f"it states {num_tensors} tensors and {num_fields} fields")
        return num_tensors, num_fields

    def read_field(self) -> tuple[str, Any]:
        """Reads a key-value field; an array comes as an `ArraySpan`."""
        return self.read_string(), self._read_value()

    def read_tensor_info(self) -> GGUFTensorInfo:
        """Reads an entry of the tensor list, which follows the fields."""
        name, num_dims = self.read_string(), self.read_number("I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"its tensor {name} has {num_dims} axes")
        shape = tuple(self.read_number("Q") for _ in range(num_dims))[::-1]  # GGML lists the innermost axis first
        return GGUFTensorInfo(name, shape, self.read_number("I"), self.read_number("Q"))

    def compute_data_offset(self, alignment: Any) -> int:
        """Returns the file offset of the tensor data."""
        if alignment not in (2**power for power in range(17)):
            raise ValueError(f"its tensors are aligned to {quote(alignment)} bytes, which is not a power of two")
        return -(-self.position // alignment) * alignment

    def _read_value(self) -> Any:
        value_type = self.read_number("I")
        if value_type == _STRING:
            return self.read_string()
        if value_type == _ARRAY:
            return self._skip_array()
        value = self.read_number(_struct_code(value_type))
        # The shortest decimal that rounds to this float32: 1e-6, not 9.99999997e-07.
        return float(str(np.float32(value))) if value_type == _FLOAT32 else value

    def _skip_array(self) -> ArraySpan:
        value_type, length = self.read_number("I"), self.read_number("Q")
        start = self.position
        if value_type == _STRING:
            if length > _MAX_STRINGS:
                raise ValueError(f"it states {length} strings in an array")
            self._require_bytes(length * struct.calcsize("<Q"))
            for _ in range(length):
                self.skip(self.read_number("Q"))
        else:
            self.skip(length * struct.calcsize(f"<{_struct_code(value_type)}"))
        return ArraySpan(value_type, length, start, self.position)

    def _require_bytes(self, size: int) -> None:
        if self.position + size > len(self.data):
            raise struct.error(f"{size} bytes at offset {self.position} are past the end")


def decode_array(raw: bytes, span: ArraySpan) -> Sequence[Any]:
    """Decodes an array from its raw bytes; an array of bytes is returned as bytes."""
    if span.value_type == _STRING:
        strings, offset = [], 0
        for _ in range(span.length):
            (size,) = struct.unpack_from("<Q", raw, offset)
            offset += struct.calcsize("<Q") + size
            strings.append(raw[offset - size : offset].decode(errors="replace"))
        return strings
    code = _STRUCT_CODES[span.value_type]
    return raw if code in "Bb" else struct.unpack(f"<{span.length}{code}", raw)


def _struct_code(value_type: int) -> str:
    if value_type not in _STRUCT_CODES:
        raise ValueError(f"a value has the type {value_type}, which does not exist")
    return _STRUCT_CODES[value_type]
