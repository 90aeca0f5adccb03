"""Reads the header of a GGUF file, no tensor."""

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
from kadr.regular_file import open_regular
from kadr.schema import GGUF

ARCHITECTURE_KEY, NAME_KEY, CONFIG_KEY = "general.architecture", "general.name", "config"
LTXV_ARCHITECTURE, T5_ENCODER_ARCHITECTURE = "ltxv", "t5encoder"
# Some writers state none, or one of their own for any model: then the tensor names decide.
_UNSPECIFIC_ARCHITECTURES = (None, "pig", "cow")
_FULL_T5_ARCHITECTURE = "t5"
# GGML type ids: unquantized types, and block-quantized ones.
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
    """The fields and tensors that a GGUF file lists.

    Args:
        infos: tensor name -> its description.
        fields: name -> number, boolean or string; an array is an `ArraySpan`.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    fields: Mapping[str, Any]

    @property
    def architecture(self) -> str | None:
        return self.fields.get(ARCHITECTURE_KEY)

    @property
    def metadata(self) -> dict[str, str]:
        """All fields except arrays, as strings."""
        return {name: str(value) for name, value in self.fields.items() if not isinstance(value, ArraySpan)}

    def read_array(self, name: str) -> Sequence[Any] | None:
        """Reads an array field; an array of bytes comes as bytes. Returns None if there is no such array.

        Raises:
            CheckpointError: the file can no longer be read.
        """
        span = self.fields.get(name)
        if not isinstance(span, ArraySpan):
            return None
        try:
            with self.path.open("rb") as file:
                file.seek(span.start)
                return decode_array(file.read(span.end - span.start), span)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{self.path} can no longer be read: {error}. Open it again.") from error


def is_gguf(path: Path) -> bool:
    """Returns whether a file starts with GGUF's magic bytes."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads the header, no tensor and no array.

    Raises:
        CheckpointError: the file is unreadable, damaged, truncated, one of several splits, of another family of models,
            of a newer kadr, or has a tensor of a type that kadr does not support.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_header(path, GGUFParser(mapped))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Make it readable.") from error
    except struct.error as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is truncated: its header continues after {size:,} bytes. {_DOWNLOAD_AGAIN}"
        ) from error
    except (ValueError, TypeError) as error:  # TypeError: a field of another type than expected
        raise CheckpointError(f"{path}: its header cannot be read: {error}. {_DOWNLOAD_AGAIN}") from error


def _read_header(path: Path, parser: GGUFParser) -> GGUFHeader:
    version = parser.read_number("I")
    if version not in SUPPORTED_VERSIONS:
        is_big_endian = version >> 24 in SUPPORTED_VERSIONS
        problem = "is big-endian" if is_big_endian else f"is of version {version} of the format"
        raise CheckpointError(f"{path} {problem}; kadr reads versions 2 and 3, little-endian. Use a newer file.")
    num_tensors, num_fields = parser.read_counts()
    fields = GGUF.upgrade(dict(parser.read_field() for _ in range(num_fields)), path)
    _refuse_unsupported(path, fields)
    entries = [parser.read_tensor_info() for _ in range(num_tensors)]
    data_offset = parser.compute_data_offset(fields.get(ALIGNMENT_KEY, 32))
    fields_only = GGUFHeader(path, {}, fields)
    infos = {entry.name: _tensor_info(fields_only, entry, data_offset) for entry in entries}
    if len(infos) != len(entries):
        raise ValueError("two tensors have the same name")
    if not infos:
        raise CheckpointError(f"{path} is a GGUF file without tensors. Use the file with the weights.")
    _refuse_truncated(path, infos, len(parser.data))
    return GGUFHeader(path, infos, fields)


def _refuse_truncated(path: Path, infos: Mapping[str, TensorInfo], size: int) -> None:
    """Refuses a file of `size` bytes that ends before its last tensor does."""
    expected_size = max(info.file_offset + info.size_bytes for info in infos.values())
    if size < expected_size:
        raise CheckpointError(
            f"{path} is truncated: it has {size:,} bytes, its header states {expected_size:,}. {_DOWNLOAD_AGAIN}"
        )


def _tensor_info(header: GGUFHeader, entry: GGUFTensorInfo, data_offset: int) -> TensorInfo:
    name, shape, type_id, offset = entry
    if type_id not in UNQUANTIZED_TYPES and type_id not in BLOCK_TYPES:
        raise CheckpointError(
            f"{header.path}: its tensor {name} is stored as {_type_name(type_id)}, which kadr does not support; it "
            f"supports F32, F16, BF16, {', '.join(GGML_TYPES)}. Use a file of the same model in one of these, such as "
            "Q4_K_M."
        )
    shape = _restore_shape(header, name, shape)
    ggml_type = GGML_TYPES[BLOCK_TYPES[type_id]] if type_id in BLOCK_TYPES else None
    if ggml_type is not None and (not shape or shape[-1] % ggml_type.block_size):
        raise ValueError(f"its tensor {name} of {list(shape)} has rows that are not whole blocks of {ggml_type.name}")
    dtype = torch.uint8 if ggml_type else UNQUANTIZED_TYPES[type_id]
    return TensorInfo(name, shape, dtype, header.path, data_offset + offset, ggml_type)


def _restore_shape(header: GGUFHeader, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the original shape of a tensor where the header has one, else the stored shape."""
    original_shape = header.read_array(_ORIGINAL_SHAPE + name)
    if original_shape is None:
        return shape
    if prod(original_shape) != prod(shape):
        raise ValueError(
            f"its tensor {name} is {list(shape)}, and its original shape is given as {list(original_shape)}"
        )
    return tuple(original_shape)


def _type_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType  # imported here: only this error needs the package

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"GGML type {type_id}"


def _refuse_unsupported(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuses a split file and a model of another family by its fields, whatever tensors it has."""
    architecture, num_splits = fields.get(ARCHITECTURE_KEY), fields.get("split.count", 1)
    if num_splits > 1:
        raise CheckpointError(
            f"{path} is one of {num_splits} splits of a file. Merge them with llama.cpp's `llama-gguf-split --merge`."
        )
    if architecture == _FULL_T5_ARCHITECTURE:
        raise CheckpointError(
            f"{path} is a whole T5, with its decoder. Use the encoder alone, such as that of "
            "city96/t5-v1_1-xxl-encoder-gguf."
        )
    if architecture not in (*_UNSPECIFIC_ARCHITECTURES, LTXV_ARCHITECTURE, T5_ENCODER_ARCHITECTURE):
        kind = "a language model" if _is_language_model(architecture, fields) else "a model of another family"
        raise CheckpointError(
            f"{path} is {kind} (its architecture is {architecture}). kadr runs LTX-Video 0.9 to 0.9.8 "
            f"({LTXV_ARCHITECTURE}) with the encoder of T5 v1.1 XXL ({T5_ENCODER_ARCHITECTURE})."
        )


def _is_language_model(architecture: str | None, fields: Mapping[str, Any]) -> bool:
    return any(name.startswith("tokenizer.") for name in fields) or f"{architecture}.context_length" in fields
