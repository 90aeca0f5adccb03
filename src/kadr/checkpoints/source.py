"""Tensors by name, from one file or several: the header first, the bytes when they are asked for.

Bytes are mapped, not read: a tensor shares memory with the page cache, and costs nothing until it is touched. The
mapping goes when the last tensor of its file goes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kadr.checkpoints.gguf.header import is_gguf, read_gguf_header
from kadr.checkpoints.header import TensorInfo, read_header
from kadr.checkpoints.memory_map import map_file
from kadr.errors import CheckpointError

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # of the weights in a component's folder: diffusers', transformers'
FILE_VARIANTS = ("", ".bf16", ".fp16")  # the unmarked one first: it is what the authors ran


@dataclass(frozen=True)
class Source:
    """One or several safetensors files, or a GGUF file, seen as one mapping of names.

    Args:
        path: what was opened, for messages.
        infos: name -> what the header says of the tensor. A name may differ from the one in the file: see `rename_tensors`.
        metadata: of the header; of several files, the first one's.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Source:
        """Read the header of a safetensors or a GGUF file, told apart by how they begin; or those of the weights in a
        component's folder (shards and variants too).

        Raises:
            CheckpointError: nothing is there, it is neither of the two, it is cut short, or a shard is missing.
        """
        path = Path(path)
        files = _find_weight_files(path) if path.is_dir() else (path,)
        infos: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            found, said = _read_any_header(file)
            twice = infos.keys() & found.keys()
            if twice:
                raise CheckpointError(
                    f"{path}: the tensor {min(twice)} is in two of its files. Download the folder again."
                )
            infos |= found
            metadata = metadata or dict(said)
        return cls(path, infos, metadata)

    @property
    def size_bytes(self) -> int:
        """Of the tensors, as they are stored."""
        return sum(info.size_bytes for info in self.infos.values())

    @property
    def num_parameters(self) -> int:
        return sum(info.numel for info in self.infos.values())

    @property
    def dtype(self) -> torch.dtype:
        """What most of the bytes are stored as: uint8 where they are packed, float32 where there are none."""
        weight: dict[torch.dtype, int] = {}
        for info in self.infos.values():
            weight[info.dtype] = weight.get(info.dtype, 0) + info.size_bytes
        return max(weight, key=weight.__getitem__, default=torch.float32)

    @property
    def type_counts(self) -> dict[str, int]:
        """What the tensors are stored as ("bfloat16", "Q4_K" and so on) -> how many, most bytes first."""
        weight, count = Counter[str](), Counter[str]()
        for info in self.infos.values():
            weight[info.storage_type] += info.size_bytes
            count[info.storage_type] += 1
        return {name: count[name] for name, _ in weight.most_common()}

    def rename_tensors(self, names: Mapping[str, str]) -> Source:
        """The same files under other names. names: new -> present; what it does not mention is left out."""
        return Source(self.path, {new: self.infos[old] for new, old in names.items()}, self.metadata)

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype and shape, on the CPU, sharing memory with the file.

        One that is packed comes as the bytes of its blocks, uint8 (rows, bytes of a row): see its `packing`.
        Writing to it does not reach the file: written pages become the process's own.

        Raises:
            KeyError: no such name.
            CheckpointError: the file went away or shrank since it was opened.
        """
        info = self.infos[name]
        if not info.numel:  # torch takes no empty buffer
            return torch.empty(info.storage_shape, dtype=info.dtype)
        mapped = map_file(info.file)
        if len(mapped) < info.file_offset + info.size_bytes:
            raise CheckpointError(
                f"{info.file} shrank to {len(mapped):,} bytes since it was opened. Download it again."
            )
        if (
            info.file_offset % info.dtype.itemsize
        ):  # old writers did not align; torch wants whole numbers at whole places
            piece = bytearray(mapped[info.file_offset : info.file_offset + info.size_bytes])
            return torch.frombuffer(piece, dtype=info.dtype).view(info.storage_shape)
        count = info.size_bytes // info.dtype.itemsize
        flat = torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=info.file_offset)
        return flat.view(info.storage_shape)


def _read_any_header(file: Path) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    if not is_gguf(file):
        return read_header(file)
    header = read_gguf_header(file)
    return header.infos, header.metadata


def _find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a component's folder: the shards that an index names, or one file."""
    for variant in FILE_VARIANTS:
        for stem in WEIGHT_STEMS:
            indexes = (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json")
            for index in dict.fromkeys(folder / name for name in indexes):
                if index.is_file():
                    return _find_shards(index)
            file = folder / f"{stem}{variant}.safetensors"
            if file.is_file():
                return (file,)
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    found = f" (it has {pickles[0]}, a pickle, which kadr never reads: it may run code)" if pickles else ""
    raise CheckpointError(
        f"{folder} has no weights in it{found}: none of {_join_first(f'{stem}.safetensors' for stem in WEIGHT_STEMS)}, "
        "nor an index of shards. Name the .safetensors itself, or download the folder again."
    )


def _find_shards(index: Path) -> tuple[Path, ...]:
    try:
        places: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no file, or one in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of shards: {error!r}. Download it again.") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of its {len(names)} shards: {_join_first(absent)}. "
            f"Download what is missing, beside {index.name}."
        )
    return tuple(index.parent / name for name in names)


def _join_first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
