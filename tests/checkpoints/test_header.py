"""The header of a safetensors file is read within limits of memory and time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kadr.checkpoints.header import MAX_HEADER_BYTES, MAX_TENSORS, read_header
from kadr.errors import CheckpointError

EMPTY_TENSOR = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def write_header(path: Path, header: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_longest_header_is_read_and_a_longer_one_refused(tmp_path: Path) -> None:
    padding = MAX_HEADER_BYTES - len(b'{"__metadata__":{"log":""}}')
    header = b'{"__metadata__":{"log":"' + b"x" * padding + b'"}}'
    assert len(read_header(write_header(tmp_path / "a.safetensors", header))[1]["log"]) == padding
    with pytest.raises(CheckpointError, match=r"has a header of 16,000,001 bytes; kadr reads at most 16,000,000"):
        read_header(write_header(tmp_path / "b.safetensors", header + b" "))


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path) -> None:
    header = json.dumps({str(number): EMPTY_TENSOR for number in range(MAX_TENSORS + 1)}).encode()
    with pytest.raises(CheckpointError, match=r"states 50,001 tensors; kadr reads at most 50,000"):
        read_header(write_header(tmp_path / "x.safetensors", header))
