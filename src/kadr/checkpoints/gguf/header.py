"""The header of a GGUF file: what is in it, without reading it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from kadr.checkpoints.gguf.parser import ALIGNMENT, MAGIC, VERSIONS, Cursor, Head, Stretch, entries
from kadr.checkpoints.header import TensorInfo
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES

ARCHITECTURE, NAME, CONFIG = "general.architecture", "general.name", "config"
TRANSFORMER, TEXT_ENCODER = "ltxv", "t5encoder"  # architectures
# Some writers name none, or one of their own for whatever model it is: its tensors have to tell.
_UNTOLD = (None, "pig", "cow")
_WHOLE_T5 = "t5"
# Numbers of GGML's types: those that are stored as plain numbers, and those in blocks.
PLAIN: Mapping[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
PACKED: Mapping[int, str] = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_AGAIN = "Download it again."


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Args:
        fields: name -> number, truth or text; a list is a `Stretch`.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    fields: Mapping[str, Any]

    @property
    def architecture(self) -> str | None:
        return self.fields.get(ARCHITECTURE)

    @property
    def metadata(self) -> dict[str, str]:
        """All that is no list, as text."""
        return {name: str(value) for name, value in self.fields.items() if not isinstance(value, Stretch)}

    def entries(self, name: str) -> Sequence[Any] | None:
        """What a list holds: bytes where they are bytes. None where there is no such list.

        Raises:
            CheckpointError: the file went away.
        """
        at = self.fields.get(name)
        if not isinstance(at, Stretch):
            return None
        try:
            with self.path.open("rb") as file:
                file.seek(at.start)
                return entries(file.read(at.end - at.start), at)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{self.path} cannot be read any more: {error}. Open it again.") from error


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GGUFHeader:
    """Read the header. No tensor and no list is read.

    Raises:
        CheckpointError: the file is unreadable, damaged, cut short, one of several parts, of another family of models,
            or has a tensor in a type that kadr does not read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _header(path, Cursor(mapped))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Make it readable.") from error
    except struct.error as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} is cut short: its header goes on after {size:,} bytes. {_AGAIN}") from error
    except (ValueError, TypeError) as error:  # TypeError: a value of another kind than it should be
        raise CheckpointError(f"{path}: its header cannot be read: {error}. {_AGAIN}") from error


def _header(path: Path, cursor: Cursor) -> GGUFHeader:
    version = cursor.number("I")
    if version not in VERSIONS:
        swapped = version >> 24 in VERSIONS
        what = "is written for big-endian machines" if swapped else f"is of version {version} of the format"
        raise CheckpointError(f"{path} {what}; kadr reads versions 2 and 3, little-endian. Take a newer file.")
    tensors, values = cursor.counts()
    fields = dict(cursor.field() for _ in range(values))
    _refuse_others(path, fields)
    heads = [cursor.head() for _ in range(tensors)]
    base = cursor.base(fields.get(ALIGNMENT, 32))
    bare = GGUFHeader(path, {}, fields)
    infos = {head.name: _info(bare, head, base) for head in heads}
    if len(infos) != len(heads):
        raise ValueError("two tensors have the same name")
    if not infos:
        raise CheckpointError(f"{path} is a GGUF file that holds no tensors. Take the file with the weights.")
    promised, size = max(info.start + info.bytes for info in infos.values()), len(cursor.data)
    if size < promised:
        raise CheckpointError(f"{path} is cut short: it has {size:,} bytes, its header promises {promised:,}. {_AGAIN}")
    return GGUFHeader(path, infos, fields)


def _info(header: GGUFHeader, head: Head, base: int) -> TensorInfo:
    name, shape, kind, offset = head
    if kind not in PLAIN and kind not in PACKED:
        raise CheckpointError(
            f"{header.path}: its tensor {name} is stored as {_type_name(kind)}, which kadr does not read; it reads "
            f"F32, F16, BF16, {', '.join(GGML_TYPES)}. Take a file of the same model in one of those, such as Q4_K_M."
        )
    original = header.entries(_ORIGINAL_SHAPE + name)
    if original is not None:
        if prod(original) != prod(shape):
            raise ValueError(f"its tensor {name} of {list(shape)} is said to have been {list(original)}")
        shape = tuple(original)
    packing = GGML_TYPES[PACKED[kind]] if kind in PACKED else None
    if packing is not None and (not shape or shape[-1] % packing.block_size):
        raise ValueError(f"its tensor {name} of {list(shape)} has rows that are no whole blocks of {packing.name}")
    dtype = torch.uint8 if packing else PLAIN[kind]
    return TensorInfo(name, shape, dtype, header.path, base + offset, packing)


def _type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType  # here: only this error needs the package

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind} of GGML"


def _refuse_others(path: Path, fields: Mapping[str, Any]) -> None:
    """Say what a file is that is of no family that kadr runs, whatever tensors it has."""
    architecture, parts = fields.get(ARCHITECTURE), fields.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a file. Join them with llama.cpp's `llama-gguf-split --merge`."
        )
    if architecture == _WHOLE_T5:
        raise CheckpointError(
            f"{path} is a whole T5, with its decoder. Take the encoder alone, such as that of "
            "city96/t5-v1_1-xxl-encoder-gguf."
        )
    if architecture not in (*_UNTOLD, TRANSFORMER, TEXT_ENCODER):
        words = any(name.startswith("tokenizer.") for name in fields) or f"{architecture}.context_length" in fields
        what = "a language model" if words else "a model of another family"
        raise CheckpointError(
            f"{path} is {what} (its architecture is {architecture}). kadr runs LTX-Video 0.9 to 0.9.8 ({TRANSFORMER}) "
            f"with the encoder of T5 v1.1 XXL ({TEXT_ENCODER})."
        )
