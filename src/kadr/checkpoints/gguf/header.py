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

from kadr.checkpoints.gguf.parser import (
    ALIGNMENT_KEY,
    MAGIC,
    SUPPORTED_VERSIONS,
    ArraySpan,
    GGUFParser,
    GGUFTensorInfo,
    decode_array,
)
from kadr.checkpoints.header import TensorInfo
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES

ARCHITECTURE_KEY, NAME_KEY, CONFIG_KEY = "general.architecture", "general.name", "config"
LTXV_ARCHITECTURE, T5_ENCODER_ARCHITECTURE = "ltxv", "t5encoder"  # architectures
# Some writers name none, or one of their own for whatever model it is: its tensors have to tell.
_UNSPECIFIC_ARCHITECTURES = (None, "pig", "cow")
_FULL_T5_ARCHITECTURE = "t5"
# Numbers of GGML's types: those that are stored as plain numbers, and those in blocks.
UNQUANTIZED_TYPES: Mapping[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
BLOCK_TYPES: Mapping[int, str] = {
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
_DOWNLOAD_AGAIN = "Download it again."


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Args:
        fields: name -> number, truth or text; a list is a `ArraySpan`.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    fields: Mapping[str, Any]

    @property
    def architecture(self) -> str | None:
        return self.fields.get(ARCHITECTURE_KEY)

    @property
    def metadata(self) -> dict[str, str]:
        """All that is no list, as text."""
        return {name: str(value) for name, value in self.fields.items() if not isinstance(value, ArraySpan)}

    def read_array(self, name: str) -> Sequence[Any] | None:
        """What a list holds: bytes where they are bytes. None where there is no such list.

        Raises:
            CheckpointError: the file went away.
        """
        at = self.fields.get(name)
        if not isinstance(at, ArraySpan):
            return None
        try:
            with self.path.open("rb") as file:
                file.seek(at.start)
                return decode_array(file.read(at.end - at.start), at)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{self.path} cannot be read any more: {error}. Open it again.") from error


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header. No tensor and no list is read.

    Raises:
        CheckpointError: the file is unreadable, damaged, cut short, one of several parts, of another family of models,
            or has a tensor in a type that kadr does not read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_header(path, GGUFParser(mapped))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Make it readable.") from error
    except struct.error as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is cut short: its header goes on after {size:,} bytes. {_DOWNLOAD_AGAIN}"
        ) from error
    except (ValueError, TypeError) as error:  # TypeError: a value of another kind than it should be
        raise CheckpointError(f"{path}: its header cannot be read: {error}. {_DOWNLOAD_AGAIN}") from error


def _read_header(path: Path, parser: GGUFParser) -> GGUFHeader:
    version = parser.read_number("I")
    if version not in SUPPORTED_VERSIONS:
        swapped = version >> 24 in SUPPORTED_VERSIONS
        what = "is written for big-endian machines" if swapped else f"is of version {version} of the format"
        raise CheckpointError(f"{path} {what}; kadr reads versions 2 and 3, little-endian. Take a newer file.")
    tensors, values = parser.read_counts()
    fields = dict(parser.read_field() for _ in range(values))
    _refuse_unsupported(path, fields)
    heads = [parser.read_tensor_info() for _ in range(tensors)]
    base = parser.compute_data_offset(fields.get(ALIGNMENT_KEY, 32))
    bare = GGUFHeader(path, {}, fields)
    infos = {head.name: _tensor_info(bare, head, base) for head in heads}
    if len(infos) != len(heads):
        raise ValueError("two tensors have the same name")
    if not infos:
        raise CheckpointError(f"{path} is a GGUF file that holds no tensors. Take the file with the weights.")
    promised, size = max(info.file_offset + info.size_bytes for info in infos.values()), len(parser.data)
    if size < promised:
        raise CheckpointError(
            f"{path} is cut short: it has {size:,} bytes, its header promises {promised:,}. {_DOWNLOAD_AGAIN}"
        )
    return GGUFHeader(path, infos, fields)


def _tensor_info(header: GGUFHeader, entry: GGUFTensorInfo, data_offset: int) -> TensorInfo:
    name, shape, kind, offset = entry
    if kind not in UNQUANTIZED_TYPES and kind not in BLOCK_TYPES:
        raise CheckpointError(
            f"{header.path}: its tensor {name} is stored as {_type_name(kind)}, which kadr does not read; it reads "
            f"F32, F16, BF16, {', '.join(GGML_TYPES)}. Take a file of the same model in one of those, such as Q4_K_M."
        )
    original = header.read_array(_ORIGINAL_SHAPE + name)
    if original is not None:
        if prod(original) != prod(shape):
            raise ValueError(f"its tensor {name} of {list(shape)} is said to have been {list(original)}")
        shape = tuple(original)
    packing = GGML_TYPES[BLOCK_TYPES[kind]] if kind in BLOCK_TYPES else None
    if packing is not None and (not shape or shape[-1] % packing.block_size):
        raise ValueError(f"its tensor {name} of {list(shape)} has rows that are no whole blocks of {packing.name}")
    dtype = torch.uint8 if packing else UNQUANTIZED_TYPES[kind]
    return TensorInfo(name, shape, dtype, header.path, data_offset + offset, packing)


def _type_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType  # here: only this error needs the package

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"type {type_id} of GGML"


def _refuse_unsupported(path: Path, fields: Mapping[str, Any]) -> None:
    """Say what a file is that is of no family that kadr runs, whatever tensors it has."""
    architecture, parts = fields.get(ARCHITECTURE_KEY), fields.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a file. Join them with llama.cpp's `llama-gguf-split --merge`."
        )
    if architecture == _FULL_T5_ARCHITECTURE:
        raise CheckpointError(
            f"{path} is a whole T5, with its decoder. Take the encoder alone, such as that of "
            "city96/t5-v1_1-xxl-encoder-gguf."
        )
    if architecture not in (*_UNSPECIFIC_ARCHITECTURES, LTXV_ARCHITECTURE, T5_ENCODER_ARCHITECTURE):
        words = any(name.startswith("tokenizer.") for name in fields) or f"{architecture}.context_length" in fields
        what = "a language model" if words else "a model of another family"
        raise CheckpointError(
            f"{path} is {what} (its architecture is {architecture}). kadr runs LTX-Video 0.9 to 0.9.8 ({LTXV_ARCHITECTURE}) "
            f"with the encoder of T5 v1.1 XXL ({T5_ENCODER_ARCHITECTURE})."
        )
