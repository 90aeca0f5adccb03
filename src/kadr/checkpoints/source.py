"""Tensors by name, from one file or several: headers are read at once, bytes on demand.

Bytes are mapped, not read: a tensor shares memory with the page cache, and takes none until it is accessed. The map is
closed with the last tensor of its file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor

from kadr.checkpoints.gguf.header import is_gguf, read_gguf_header
from kadr.checkpoints.header import TensorInfo, read_header, refuse_too_many_tensors
from kadr.errors import CheckpointError
from kadr.json_reader import parse_json
from kadr.memory.mapped_files import map_file
from kadr.quoting import quote, show
from kadr.regular_file import read_text

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # file stems of the weights in diffusers and transformers folders
FILE_VARIANTS = ("", ".bf16", ".fp16")  # the unmarked one first: it is what the authors ran
MAX_LISTED_NAMES = 5  # in an error


@dataclass(frozen=True)
class Source:
    """One or several safetensors files, or a GGUF file, seen as one mapping of names.

    Args:
        path: path that was opened, for messages.
        infos: name -> tensor in the header. A name may differ from the one in the file: see `rename_tensors`.
        metadata: metadata of the header; with several files, the first non-empty one.
        absent_release: name of the release that is not on disk, and whose header this predicts (`checkpoints.predict`);
            None for files on disk.
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    absent_release: str | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Source:
        """Reads the header of a safetensors or GGUF file, or the headers of the weights in a component's folder.

        The first bytes decide the format. A folder may have shards and variants.

        Raises:
            CheckpointError: nothing is there, it is in another format, it is truncated, or a shard is missing.
        """
        path = Path(path)
        files = _find_weight_files(path) if path.is_dir() else (path,)
        infos: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            file_infos, file_metadata = _read_any_header(file)
            _refuse_duplicates(path, infos.keys() & file_infos.keys())
            infos |= file_infos
            refuse_too_many_tensors(path, len(infos))
            metadata = metadata or dict(file_metadata)
        return cls(path, infos, metadata)

    @property
    def is_on_disk(self) -> bool:
        """False where the header is predicted; then no tensor can be read."""
        return self.absent_release is None

    def refuse_absent(self) -> None:
        """Refuses to read what is not on disk.

        Raises:
            CheckpointError: the header is predicted.
        """
        if self.absent_release is not None:
            name = self.absent_release
            raise CheckpointError(f"{name} is not on disk. Fetch it with `kadr models pull {name}`.")

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors as stored."""
        return sum(info.size_bytes for info in self.infos.values())

    @property
    def num_parameters(self) -> int:
        return sum(info.numel for info in self.infos.values())

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of most of the bytes: uint8 for block-quantized tensors, float32 where there are none."""
        dtype_bytes: dict[torch.dtype, int] = {}
        for info in self.infos.values():
            dtype_bytes[info.dtype] = dtype_bytes.get(info.dtype, 0) + info.size_bytes
        return max(dtype_bytes, key=dtype_bytes.__getitem__, default=torch.float32)

    @property
    def type_counts(self) -> dict[str, int]:
        """Storage type ("bfloat16", "Q4_K" and so on) -> number of tensors, most bytes first."""
        type_bytes, counts = Counter[str](), Counter[str]()
        for info in self.infos.values():
            type_bytes[info.storage_type] += info.size_bytes
            counts[info.storage_type] += 1
        return {name: counts[name] for name, _ in type_bytes.most_common()}

    def rename_tensors(self, names: Mapping[str, str]) -> Source:
        """Returns the same files under other names.

        Args:
            names: new name -> current name; tensors that it does not mention are left out.
        """
        return replace(self, infos={new: self.infos[current] for new, current in names.items()})

    def read(self, name: str) -> Tensor:
        """Returns a tensor in its stored dtype and shape, on the CPU, sharing memory with the file.

        A block-quantized tensor comes as the bytes of its blocks, uint8 (rows, bytes of a row): see
        `TensorInfo.ggml_type`. Writing to a tensor does not change the file: written pages become private.

        Raises:
            KeyError: no such name.
            CheckpointError: the file is not on disk, or is gone or shrank since it was opened.
        """
        self.refuse_absent()
        info = self.infos[name]
        if not info.numel:  # torch takes no empty buffer
            return torch.empty(info.storage_shape, dtype=info.dtype)
        mapped = map_file(info.file)
        if len(mapped) < info.file_offset + info.size_bytes:
            raise CheckpointError(
                f"{info.file} shrank to {len(mapped):,} bytes since it was opened. Download it again."
            )
        return _view_flat(info, mapped).view(info.storage_shape)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Reads a file that `save.write_tensors` wrote: its tensors, as `Source.read`, and the metadata of its header.

    Unlike those of safetensors, any path will do, also one that is not UTF-8.

    Raises:
        ValueError: the file is gone or damaged. The message names no file and no way out, which the caller knows.
    """
    try:
        source = Source.open(path)
        return {name: source.read(name) for name in source.infos}, source.metadata
    except CheckpointError as error:
        raise ValueError("it is gone or damaged") from error


def _view_flat(info: TensorInfo, mapped: mmap) -> Tensor:
    """Returns the values of a tensor on one axis, sharing memory with the map unless they are not aligned."""
    if info.file_offset % info.dtype.itemsize:  # old writers did not align; torch.frombuffer requires it
        copied = bytearray(mapped[info.file_offset : info.file_offset + info.size_bytes])
        return torch.frombuffer(copied, dtype=info.dtype)
    count = info.size_bytes // info.dtype.itemsize
    return torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=info.file_offset)


def _refuse_duplicates(path: Path, names: Set[str]) -> None:
    """Refuses a folder in which tensors of these names are in two files."""
    if names:
        raise CheckpointError(f"{path}: the tensor {min(names)} is in two of its files. Download the folder again.")


def _read_any_header(file: Path) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    if not is_gguf(file):
        return read_header(file)
    header = read_gguf_header(file)
    return header.infos, header.metadata


def _find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Finds the weight files of a component's folder: the shards that an index names, or one file."""
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
    pickle = f" (it has {pickles[0]}, a pickle, which kadr never reads: it may run code)" if pickles else ""
    names = join_first(f"{stem}.safetensors" for stem in WEIGHT_STEMS)
    raise CheckpointError(
        f"{folder} has no weights in it{pickle}: none of {names}, nor an index of shards. Name the .safetensors "
        "itself, or download the folder again."
    )


def _find_shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map: dict[str, str] = parse_json(read_text(index))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no file, or one in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = show(error, 200) if isinstance(error, OSError | ValueError) else quote(error)
        raise CheckpointError(f"{index} cannot be read as an index of shards: {reason}. Download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of its {len(names)} shards: {join_first(missing)}. "
            f"Download them into the folder of {index.name}."
        )
    return tuple(index.parent / name for name in names)


def join_first(names: Iterable[str], count: int = MAX_LISTED_NAMES) -> str:
    """Joins the first `count` names of a list for an error, and says how many more there are."""
    names = list(names)
    listed, rest = names[:count], len(names) - count
    return ", ".join(listed) + (f" and {rest} more" if rest > 0 else "")
