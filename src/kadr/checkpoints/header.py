"""Reads the header of a safetensors file, no tensor.

The format (https://github.com/huggingface/safetensors#format): eight bytes give the length of a JSON header, the
header lists every tensor with its dtype, shape and offsets, and the bytes of the tensors follow to the end of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from kadr.errors import CheckpointError
from kadr.json_reader import parse_json
from kadr.kernels.ggml_types import GGMLType
from kadr.regular_file import open_regular

LENGTH_BYTES = 8
FORMAT_HEADER_BYTES = 100_000_000  # the format's own limit, which takes gigabytes and a minute to parse
MAX_HEADER_BYTES, MAX_TENSORS = 16_000_000, 50_000  # released files have 0.3 MB and 2,000; LoRAs may store logs
SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # storage dtypes; kadr computes in wider ones
_DOWNLOAD_AGAIN = "Download it again."
_WRONG_FILE = "Check that the path names the checkpoint, or download it again."
# First bytes of other formats, what the file is, and the way out.
_OTHER_FORMATS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (
        (b"<!doctype", b"<html", b"<?xml"),
        "a web page, not a checkpoint: the server answered the download with a page",
        "Download the file by its resolve/main link; log in first if its page asks you to.",
    ),
    (
        (b"version https://git-lfs",),
        "a git-lfs pointer: git's placeholder for the file",
        "Fetch the file with `git lfs pull`, or download it.",
    ),
)
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, as its header describes it.

    Args:
        name: its key in the file.
        dtype: storage dtype; uint8 for a block-quantized tensor.
        file_offset: offset of its bytes from the start of the file.
        ggml_type: block type of a tensor in a GGUF file; None for an unquantized one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    file_offset: int
    ggml_type: GGMLType | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the tensor as read: the last axis of a block-quantized one counts bytes."""
        if self.ggml_type is None:
            return self.shape
        return (*self.shape[:-1], self.ggml_type.row_bytes(self.shape[-1]))

    @property
    def storage_type(self) -> str:
        """Name of its storage type: "bfloat16", "Q4_K" and so on."""
        return self.ggml_type.name if self.ggml_type else str(self.dtype).removeprefix("torch.")

    @property
    def size_bytes(self) -> int:
        if self.ggml_type is not None:
            return self.numel // self.ggml_type.block_size * self.ggml_type.type_size
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, and its metadata. No tensor is read.

    Raises:
        CheckpointError: the file is absent, unreadable, truncated, or in another format.
    """
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            start = file.read(512)
            refuse_other_format(path, start, size)
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            if LENGTH_BYTES + length > size:
                raise CheckpointError(
                    f"{path} is truncated: it has {size:,} bytes, and its header alone takes "
                    f"{LENGTH_BYTES + length:,}. {_DOWNLOAD_AGAIN}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} has a header of {length:,} bytes; kadr reads at most {MAX_HEADER_BYTES:,}. {_WRONG_FILE}"
                )
            file.seek(LENGTH_BYTES)
            raw = file.read(length)
    except OSError as error:
        raise _read_error(path, error) from error
    header = _parse_header(path, raw)
    refuse_too_many_tensors(path, len(header))
    metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
    infos = {name: _tensor_info(path, name, entry, LENGTH_BYTES + length) for name, entry in header.items()}
    expected_size = max((info.file_offset + info.size_bytes for info in infos.values()), default=LENGTH_BYTES + length)
    if size != expected_size:
        state = "is truncated" if size < expected_size else "is too long"
        raise CheckpointError(
            f"{path} {state}: it has {size:,} bytes, its header states {expected_size:,}. {_DOWNLOAD_AGAIN}"
        )
    return infos, metadata


def refuse_too_many_tensors(path: Path, count: int) -> None:
    """Refuses a file, or the shards in a folder, with more tensors than any model has.

    Raises:
        CheckpointError: it has more than `MAX_TENSORS`.
    """
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path} states {count:,} tensors; kadr reads at most {MAX_TENSORS:,}. {_WRONG_FILE}")


def refuse_other_format(path: Path, start: bytes, size: int) -> None:
    """Refuses a file whose first bytes are not a safetensors header, with what it is.

    Raises:
        CheckpointError: it is in another format.
    """
    lowered = start.lstrip().lower()
    for magics, kind, way_out in _OTHER_FORMATS:
        if lowered.startswith(magics):
            raise CheckpointError(f"{path} ({size:,} bytes) is {kind}. {way_out}")
    # The length of a header may begin like a pickle; then the header's opening brace follows it.
    has_pickle_magic = start.startswith(_PICKLE_MAGICS) and start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{"
    if has_pickle_magic or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle: reading one runs the code in it, so kadr never does. "
            "Use the .safetensors of the same model, or convert this file if you trust it."
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if (
        len(start) <= LENGTH_BYTES
        or not 2 <= length <= FORMAT_HEADER_BYTES
        or start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{"
    ):
        kind = "GGUF" if path.suffix.lower() == ".gguf" else "safetensors"
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a {kind} file: it does not start with a header. {_WRONG_FILE}"
        )


def _read_error(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} does not exist. Check the path.")
    return CheckpointError(f"{path} cannot be read: {error.strerror}. Make it readable, or name another file.")


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw)
    except ValueError as error:  # JSON and UTF-8 errors both
        raise CheckpointError(f"{path}: its header cannot be read: {error}. {_DOWNLOAD_AGAIN}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise CheckpointError(f"{path}: its header cannot be read: it is not a list of tensors. {_DOWNLOAD_AGAIN}")
    return header


def _tensor_info(path: Path, name: str, entry: Any, data_offset: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path}: its tensor {name} is stored as {dtype}, which kadr does not support; "
                f"it supports {', '.join(SAFETENSORS_DTYPES)}. Use the bf16 file of this model."
            )
        info = TensorInfo(name, shape, SAFETENSORS_DTYPES[dtype], path, data_offset + begin)
        is_shape = all(isinstance(length, int) and length >= 0 for length in shape)
        if not is_shape or begin < 0 or end - begin != info.size_bytes:
            raise ValueError(f"shape {list(shape)} of {dtype} does not fill bytes {begin} to {end}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its header cannot be read at the tensor {name}: {error}. {_DOWNLOAD_AGAIN}"
        ) from error
    return info


def format_shape(shape: tuple[int, ...]) -> str:
    """Returns a shape as messages show it, such as 16x32."""
    return "x".join(map(str, shape)) or "a scalar"
