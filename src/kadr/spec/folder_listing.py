"""Describes the models in folders from their headers; a broken file is an entry like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.lora.file import LoraFile
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.spec.model_folders import LORA_KINDS, TEXT_ENCODER_KINDS, FolderEntry, ModelFolders


@dataclass(frozen=True)
class ListedModel:
    """A model in a folder, as its header describes it.

    Args:
        entry: its kind, name and path; and the reason why kadr does not open it, if there is one.
        size_bytes: of the file, or of all files in its folder.
        dtype: storage type of most of its bytes, such as "bfloat16" or "Q4_K"; None where no header can be read.
    """

    entry: FolderEntry
    size_bytes: int
    dtype: str | None


def list_models(folders: ModelFolders) -> Iterator[ListedModel]:
    """Yields every model in the folders. Reads headers; no weight, and nothing of what a name does not lead to."""
    yield from map(describe_entry, folders.list_entries())


def describe_entry(entry: FolderEntry) -> ListedModel:
    """Describes one model in a folder; a broken file too."""
    size_bytes = entry.path.lstat().st_size if entry.problem else _size_bytes(entry.path)
    dtype, problem = (None, entry.problem) if entry.problem else _read_dtype(entry)
    return ListedModel(replace(entry, problem=problem), size_bytes, dtype)


def _read_dtype(entry: FolderEntry) -> tuple[str | None, str | None]:
    """Returns the storage type, and the reason why kadr does not open it."""
    try:
        return _DTYPE_READERS.get(entry.kind, _model_dtype)(entry.path), None
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{entry.path} cannot be read: {error.strerror or error}. Make it readable."


def _model_dtype(path: Path) -> str:
    return Checkpoint.open(path).describe().components[0].dtype


def _text_encoder_dtype(path: Path) -> str:
    return TextEncoderCheckpoint.open(path).describe().dtype


def _lora_dtype(path: Path) -> str:
    return LoraFile.open(path, allow_partial=True).describe().dtype


_DTYPE_READERS: Mapping[str, Callable[[Path], str]] = {
    **dict.fromkeys(TEXT_ENCODER_KINDS, _text_encoder_dtype),
    **dict.fromkeys(LORA_KINDS, _lora_dtype),
}


def _size_bytes(path: Path) -> int:
    """Returns the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
