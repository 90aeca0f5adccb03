"""Prompt cache: prompt embeddings on disk, so that a prompt encoded before does not load the text encoder again.

A file has the rows of the real tokens only, in the dtype they were computed in, and its name is a hash of everything
they depend on. So a file is never out of date: a change gives another name, and the oldest files are removed in time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kadr.cache_home import cache_home
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError, KadrWarning
from kadr.memory.device import DTYPES
from kadr.schema import PROMPT_CACHE_NUMBER
from kadr.text.tokenizer import PromptTokens
from kadr.validation import check_path, expand_home

MAX_CACHE_BYTES = 512_000_000  # bytes of all files; the least recently used are removed first
FOLDER = "prompts"
_EMBEDDINGS_KEY, _DIGEST_KEY = "prompt_embeddings", "sha256"
_PROMPT_FILE_NAME = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.\d+\.part)?")


class PromptCache:
    """Prompt embeddings of one text encoder, on disk.

    Args:
        folder: created when the first embeddings are stored; None disables the cache.
        text_encoder_checkpoint: the text encoder. Names, sizes and mtimes of its files count, not their folder.
        dtype: dtype of the computation.
        device: such as "cpu" or "cuda"; the last bits differ between devices.
        weight_format: weight format of the encoder, where it changes the embeddings.
    """

    def __init__(
        self,
        folder: Path | None,
        text_encoder_checkpoint: TextEncoderCheckpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weight_format: str = "",
    ) -> None:
        self.folder, self.text_encoder_checkpoint = folder, text_encoder_checkpoint
        self.dtype, self.device, self.weight_format = dtype, device, weight_format
        self._has_warned = False

    @classmethod
    def open(
        cls,
        location: bool | Path,
        text_encoder_checkpoint: TextEncoderCheckpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weight_format: str = "",
    ) -> PromptCache:
        """Opens the cache in a folder.

        Args:
            location: the folder; True is `prompts` in `cache_home`, False disables the cache.
        """
        folder = None
        if not isinstance(location, bool):
            check_path("prompt_cache", location)
            folder = expand_home(location)
        if location is True:
            with suppress(RuntimeError):
                folder = cache_home() / FOLDER
        return cls(folder, text_encoder_checkpoint, dtype=dtype, device=device, weight_format=weight_format)

    def look_up(self, tokens: PromptTokens) -> Tensor | None:
        """Returns the rows (n, D) of the n real tokens, on the CPU; None if they are missing or damaged."""
        try:
            path = self._path(tokens)
            if path is None or not path.is_file():
                return None
            rows = _read(path, (int(tokens.mask.sum()), self.text_encoder_checkpoint.config.d_model))
        except (OSError, CheckpointError):
            return None
        if rows is not None:
            with suppress(OSError):
                os.utime(path)
        return rows

    def store(self, tokens: PromptTokens, embeddings: Tensor) -> None:
        """Stores the rows (n, D) of the n real tokens. Warns once if the folder cannot be written."""
        try:
            path = self._path(tokens)
            if path is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = embeddings.detach().cpu().contiguous()
            metadata = {_DIGEST_KEY: _digest(rows), "kadr": f"prompt {PROMPT_CACHE_NUMBER}"}
            write_tensors(path, {_EMBEDDINGS_KEY: rows}, dtype=rows.dtype, metadata=metadata)
        except (OSError, CheckpointError) as error:
            self._warn_once(error.__cause__ or error)
            return
        with suppress(OSError):  # another process may prune at the same time
            _prune(path.parent)

    def _warn_once(self, error: BaseException) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = getattr(error, "strerror", None) or error
            warnings.warn(
                f"prompt embeddings cannot be stored in {self.folder} ({reason}), so prompts will be encoded again "
                "next time. Set KADR_CACHE to a writable folder, or disable the cache with --no-prompt-cache.",
                KadrWarning,
                stacklevel=3,
            )

    def _path(self, tokens: PromptTokens) -> Path | None:
        """Returns the file of a prompt. Reads the state of the encoder's files each time: they may be replaced."""
        if self.folder is None:
            return None
        real_ids = tokens.ids[tokens.mask].tolist()
        dependencies = [
            PROMPT_CACHE_NUMBER,
            _fingerprint(self.text_encoder_checkpoint),
            str(self.dtype),
            self.device,
            self.weight_format,
            real_ids,
        ]
        return self.folder / f"{hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()}.safetensors"


def _fingerprint(text_encoder_checkpoint: TextEncoderCheckpoint) -> list[object]:
    """Returns what identifies the files of a text encoder and changes when they do."""
    infos = text_encoder_checkpoint.source.infos
    stats = [(file.name, file.stat()) for file in sorted({info.file for info in infos.values()})]
    tensors = [
        (name, info.name, info.storage_type, info.shape, info.file_offset) for name, info in sorted(infos.items())
    ]
    return [
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        tensors,
        sorted(text_encoder_checkpoint.source.metadata.items()),
        repr(text_encoder_checkpoint.config),
    ]


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    source = Source.open(path)
    info = source.infos.get(_EMBEDDINGS_KEY)
    if info is None or info.shape != shape or info.dtype not in DTYPES.values():
        return None
    rows = source.read(_EMBEDDINGS_KEY).clone()
    return rows if source.metadata.get(_DIGEST_KEY) == _digest(rows) else None


def _digest(embeddings: Tensor) -> str:
    return hashlib.sha256(embeddings.view(torch.uint8).numpy().data).hexdigest()


def _prune(folder: Path) -> None:
    """Removes the least recently used prompt files above the limit, and no other files."""
    with os.scandir(folder) as entries:
        files = [(entry.stat(), Path(entry.path)) for entry in entries if _PROMPT_FILE_NAME.fullmatch(entry.name)]
    total = 0
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > MAX_CACHE_BYTES:
            path.unlink(missing_ok=True)
