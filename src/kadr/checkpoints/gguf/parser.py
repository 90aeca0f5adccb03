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
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
# Kinds of values: those that are one number, and how `struct` calls it.
_NUMBERS: Mapping[int, str] = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _TEXT, _LIST = 6, 8, 9
_MOST_AXES, _MOST_ENTRIES = 8, 1 << 20  # more are a sign of damage


@dataclass(frozen=True)
class Stretch:
    """A list that was stepped over: so many entries of a kind, in these bytes of the file."""

    kind: int
    count: int
    start: int
    end: int


class Head(NamedTuple):
    """A tensor as the file lists it. kind: the number of its GGML type. offset: from the start of all tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Cursor:
    """Takes one thing after another out of a file, from its version on.

    Raises:
        struct.error: the file ends before.
        ValueError: what stands there cannot be.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, len(MAGIC)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.skip(size)
        return self.data[self.place - size : self.place].decode(errors="replace")

    def skip(self, size: int) -> None:
        self._require(size)
        self.place += size

    def counts(self) -> tuple[int, int]:
        """Of tensors and of values."""
        tensors, values = self.number("Q"), self.number("Q")
        if max(tensors, values) > _MOST_ENTRIES:
            raise ValueError(f"it promises {tensors} tensors and {values} values")
        return tensors, values

    def field(self) -> tuple[str, Any]:
        """A named value; a list is a `Stretch`."""
        return self.text(), self._value()

    def head(self) -> Head:
        """A tensor of the list behind the values."""
        name, axes = self.text(), self.number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"its tensor {name} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]  # GGML counts them from the innermost
        return Head(name, shape, self.number("I"), self.number("Q"))

    def base(self, alignment: Any) -> int:
        """Where the bytes of the tensors start."""
        if alignment not in (2**power for power in range(17)):
            raise ValueError(f"its tensors are aligned to {alignment!r} bytes, which is no power of two")
        return -(-self.place // alignment) * alignment

    def _value(self) -> Any:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            return self._stretch()
        value = self.number(_code(kind))
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-6, not the nearest sum of powers of 2

    def _stretch(self) -> Stretch:
        kind, count = self.number("I"), self.number("Q")
        start = self.place
        if kind == _TEXT:
            self._require(count * struct.calcsize("<Q"))
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{_code(kind)}"))
        return Stretch(kind, count, start, self.place)

    def _require(self, size: int) -> None:
        if self.place + size > len(self.data):
            raise struct.error(f"{size} bytes from {self.place} on are past the end")


def entries(raw: bytes, at: Stretch) -> Sequence[Any]:
    """What a list holds: bytes where they are bytes. raw: the bytes that it takes."""
    if at.kind == _TEXT:
        texts, place = [], 0
        for _ in range(at.count):
            (size,) = struct.unpack_from("<Q", raw, place)
            place += struct.calcsize("<Q") + size
            texts.append(raw[place - size : place].decode(errors="replace"))
        return texts
    code = _NUMBERS[at.kind]
    return raw if code in "Bb" else struct.unpack(f"<{at.count}{code}", raw)


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a value is of kind {kind}, which does not exist")
    return _NUMBERS[kind]
