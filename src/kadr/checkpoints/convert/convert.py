"""Converts a checkpoint between the official single file and a diffusers folder, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kadr.atomic_write import atomic_folder, write_json
from kadr.cancellation import cancellable, check_cancelled
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.convert.diffusers_configs import check_expressible, config_files
from kadr.checkpoints.detect.diffusers_folder import COMPONENT_FOLDERS
from kadr.checkpoints.detect.single_file import read_header_config
from kadr.checkpoints.header import FP8_DTYPES
from kadr.checkpoints.keys import (
    TRANSFORMER_KEYS,
    TRANSFORMER_PREFIX,
    UPSCALER_KEYS,
    VAE_KEYS,
    VAE_PREFIX,
    VAE_UNUSED_KEYS,
    Key,
    map_keys,
)
from kadr.checkpoints.load import account
from kadr.checkpoints.save import check_disk_space, single_file_config, write_tensors
from kadr.checkpoints.source import WEIGHT_STEMS, Source
from kadr.errors import CheckpointError
from kadr.memory.mapped_files import release_pages
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.validation import refuse_overwriting_source

CONVERT_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_SINGLE_FILE_SUFFIX = ".safetensors"
_PREFIXES = {"transformer": TRANSFORMER_PREFIX, "vae": VAE_PREFIX, "upscaler": ""}
_TABLES: Mapping[str, tuple[Key, ...]] = {
    "transformer": TRANSFORMER_KEYS,
    "vae": VAE_KEYS,
    "upscaler": UPSCALER_KEYS,
}
_FOLDER_ENTRIES = {"model_index.json", "scheduler", *COMPONENT_FOLDERS.values()}  # of a folder that is written here
ConvertWatch = Callable[[int, int], object]


@dataclass(frozen=True)
class LayoutConversion:
    """Bytes of the tensors before and after a conversion, and notes on what was left out."""

    source_bytes: int
    output_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """A component to write: key in the output -> key in the source."""

    component: str
    source: Source
    keys: Mapping[str, str]


def convert_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    replace: bool = False,
    watch: ConvertWatch = lambda done, of: None,
) -> LayoutConversion:
    """Writes a checkpoint as an official single file or as a diffusers folder, whole or not at all.

    Every tensor of the source is written once, renamed by the key tables; one that is missing or unexpected is refused.

    Args:
        checkpoint: a single file or a diffusers folder, of a model or an upscaler, not quantized.
        path: a name that ends in .safetensors is a single file, any other a folder.
        dtype: bfloat16, float16 or float32; None keeps each tensor as it is, and so its bits.
        replace: replace what is at `path`: a file, or a folder with nothing in it but what this function writes.
        watch: called with the numbers of tensors written and in all.

    Raises:
        CheckpointError: the source is quantized or incomplete, diffusers has no place for a part of it, a value does
            not fit `dtype`, `path` is there already, or it cannot be written.
        Cancelled: the current token is cancelled.
    """
    path = Path(os.path.abspath(path))
    is_folder = path.suffix.lower() != _SINGLE_FILE_SUFFIX
    files = [info.file for source in checkpoint.sources.values() for info in source.infos.values()]
    refuse_overwriting_source(path, files)
    _refuse_target(path, checkpoint.path, is_folder=is_folder, replace=replace)
    for source in checkpoint.sources.values():
        _refuse_quantized(source)
    if is_folder:
        check_expressible(checkpoint.info, checkpoint.path)
    parts = _list_parts(checkpoint, is_folder=is_folder)
    sizes = [_count_bytes(part, dtype) for part in parts]
    check_disk_space(path, sum(sizes))
    reader = _Reader(dtype, sum(len(part.keys) for part in parts), watch)
    with cancellable():
        write = _write_folder if is_folder else _write_file
        write(checkpoint, path, parts, reader)
    source_bytes = sum(_count_bytes(part, None) for part in parts)
    return LayoutConversion(source_bytes, sum(sizes), tuple(_list_notes(checkpoint, parts)))


def _list_parts(checkpoint: Checkpoint, *, is_folder: bool) -> list[_Part]:
    """Returns the components to write, whose tensors it checks; a single file of an upscaler has no VAE."""
    modules = _build_modules(checkpoint)
    if not is_folder and "upscaler" in modules:
        modules = {"upscaler": modules["upscaler"]}
    parts = []
    for component, module in modules.items():
        source = checkpoint.sources[component]
        family = checkpoint.info.vae_family if component == "vae" else None
        from_diffusers = checkpoint.info.layout == "diffusers"
        source_keys, output_keys = (
            map_keys(
                _TABLES[component],
                module.state_dict(),
                is_diffusers=is_diffusers,
                diffusers_vae_family=family if is_diffusers else None,
            )
            for is_diffusers in (from_diffusers, is_folder)
        )
        account(module, source, source_keys, ignored_keys=VAE_UNUSED_KEYS if component == "vae" else ())
        parts.append(_Part(component, source, {output_keys[key]: source_keys[key] for key in source_keys}))
    return parts


def _build_modules(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Returns component -> its module, without weights."""
    info = checkpoint.info
    with torch.device("meta"):
        modules = {
            "transformer": Transformer(info.transformer) if info.transformer else None,
            "vae": VAE(info.vae) if info.vae else None,
            "upscaler": LatentUpscaler(info.upscaler) if info.upscaler else None,
        }
    return {component: module for component, module in modules.items() if module is not None}


class _Reader:
    """Reads tensors for writing, in their new dtype, and releases the pages of each before the next."""

    def __init__(self, dtype: torch.dtype | None, count: int, watch: ConvertWatch) -> None:
        self._dtype, self._count, self._watch = dtype, count, watch
        self._done = 0
        self._previous: Tensor | None = None

    def read(self, source: Source, key: str) -> Tensor:
        check_cancelled()
        if self._previous is not None:
            release_pages([self._previous])
        self._watch(self._done, self._count)
        self._done += 1
        self._previous = tensor = source.read(key)
        return tensor if self._dtype in (None, tensor.dtype) else _convert(key, tensor, self._dtype)

    def write(self, path: Path, part_by_key: Mapping[str, tuple[_Part, str]], metadata: Mapping[str, str]) -> None:
        """Writes a safetensors file of these tensors: key -> its component, and the key without prefix."""
        tensors: dict[str, Tensor] = {}
        for key, (part, name) in part_by_key.items():
            info = part.source.infos[part.keys[name]]
            tensors[key] = torch.empty(info.shape, dtype=info.dtype, device="meta")

        def materialize(key: str, _: Tensor) -> Tensor:
            part, name = part_by_key[key]
            return self.read(part.source, part.keys[name])

        write_tensors(path, tensors, dtype=self._dtype, metadata=metadata, materialize=materialize)

    def finish(self) -> None:
        """Reports the last tensor."""
        self._watch(self._count, self._count)


def _write_folder(checkpoint: Checkpoint, path: Path, parts: Iterable[_Part], reader: _Reader) -> None:
    with atomic_folder(path) as temporary:
        for part in parts:
            folder = temporary / COMPONENT_FOLDERS[part.component]
            folder.mkdir()
            reader.write(
                folder / f"{WEIGHT_STEMS[0]}{_SINGLE_FILE_SUFFIX}", {key: (part, key) for key in part.keys}, {}
            )
        for name, content in config_files(checkpoint.info).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_json(temporary / name, content)
        reader.finish()


def _write_file(checkpoint: Checkpoint, path: Path, parts: Iterable[_Part], reader: _Reader) -> None:
    tensors = {_PREFIXES[part.component] + key: (part, key) for part in parts for key in part.keys}
    source = next(iter(checkpoint.sources.values()))
    metadata = source.metadata if checkpoint.info.layout == "single file" else {}
    config = {**_header_config(checkpoint), **read_header_config(source)}
    reader.write(path, tensors, {**metadata, "config": json.dumps(config)})
    reader.finish()


def _header_config(checkpoint: Checkpoint) -> dict[str, Any]:
    info = checkpoint.info
    if info.upscaler is not None:
        return info.upscaler.to_header()
    return single_file_config(info.transformer, info.vae, info.schedule)


def _convert(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor in another dtype.

    Raises:
        CheckpointError: a value is not finite, or not in the range of the dtype.
    """
    converted = tensor.to(dtype)
    if tensor.numel() and not _has_only_finite(converted):
        bound = max(abs(float(value)) for value in torch.aminmax(tensor))
        if not math.isfinite(bound):
            raise CheckpointError(
                f"the tensor {key} has NaN or infinity in it: the file is damaged. Download it again."
            )
        name, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise CheckpointError(
            f"the tensor {key} reaches {bound:g}; the maximum of {name} is {limit:g}. Use another --dtype, such as "
            "float32."
        )
    return converted


def _has_only_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(float(value)) for value in torch.aminmax(tensor))


def _count_bytes(part: _Part, dtype: torch.dtype | None) -> int:
    infos = [part.source.infos[key] for key in part.keys.values()]
    return sum(info.numel * (dtype or info.dtype).itemsize for info in infos)


def _list_notes(checkpoint: Checkpoint, parts: Iterable[_Part]) -> Iterable[str]:
    written = {part.component for part in parts}
    if left_out := checkpoint.sources.keys() - written:
        yield f"not in a single file of an upscaler, which uses that of the model: {', '.join(sorted(left_out))}"
    vae = checkpoint.sources.get("vae")
    if unused := [key for key in VAE_UNUSED_KEYS if vae is not None and key in vae.infos]:
        yield f"left out, because nothing reads them: {', '.join(unused)}"
    if checkpoint.path.is_dir() and (checkpoint.path / "text_encoder").is_dir():
        yield f"the text encoder stays where it is: use it with --text-encoder {checkpoint.path}"


def _refuse_quantized(source: Source) -> None:
    info = next((i for i in source.infos.values() if i.ggml_type is not None or i.dtype in FP8_DTYPES), None)
    if info is not None:
        raise CheckpointError(
            f"{source.path} is quantized ({info.name} is in {info.storage_type}). Convert the model's file in bfloat16."
        )


def _refuse_target(path: Path, source: Path, *, is_folder: bool, replace: bool) -> None:
    """Refuses to write over what is there unless it may be replaced, and ever over anything but a checkpoint."""
    if not os.path.lexists(path):
        return
    if not replace:
        raise CheckpointError(f"{path} exists already. Pass --force to replace it, or write to another path.")
    real_source = Path(os.path.realpath(source))
    if Path(os.path.realpath(path)) in (real_source, *real_source.parents):
        raise CheckpointError(f"{path} has the source {source} in it. Write to another path.")
    if path.is_dir() != is_folder:
        raise CheckpointError(f"{path} is a {'folder' if path.is_dir() else 'file'} already. Write to another path.")
    others = sorted({entry.name for entry in path.iterdir()} - _FOLDER_ENTRIES) if is_folder else []
    if others:
        raise CheckpointError(f"{path} has {others[0]} in it, which would be lost. Write to another path.")
