"""What the text encoder made of prompts, kept on disk: one that was encoded before does not touch the encoder again.

A file holds the rows of the real tokens alone, in the dtype they were computed in, and is named after everything they
depend on. So a file is never out of date: what changes gets another name, and the oldest are removed in time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError, KadrWarning
from kadr.memory.device import DTYPES
from kadr.text.tokenizer import PromptTokens

FORMAT_VERSION = 1  # part of every name: with another number, all files of before are strangers
MAX_CACHE_BYTES = 512_000_000  # bytes of all files; those used longest ago go first
FOLDER = "prompts"
_EMBEDDINGS_KEY, _DIGEST_KEY = "encoding", "sha256"
_PROMPT_FILE_NAME = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.\d+\.part)?")


def cache_home() -> Path:
    """The folder for what kadr can make again: $KADR_CACHE, else the one the system has for such things.

    Raises:
        RuntimeError: this user has no home.
    """
    if named := os.environ.get("KADR_CACHE"):
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # others are to be ignored, says the standard
        return Path(shared) / "kadr"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "kadr" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "kadr"


class PromptCache:
    """The encodings of one text encoder.

    Args:
        folder: made when there is something to keep; None keeps nothing and finds nothing.
        text_encoder_folder: the encoder. Names, sizes and times of change of its files count, not where they lie.
        dtype: that is computed in.
        device: such as "cpu" or "cuda"; the last bits differ from one to the other.
        weight_format: how its weights are held, where that changes the numbers.
    """

    def __init__(
        self,
        folder: Path | None,
        text_encoder_folder: TextEncoderCheckpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weight_format: str = "",
    ) -> None:
        self.folder, self.text_encoder_folder = folder, text_encoder_folder
        self.dtype, self.device, self.weight_format = dtype, device, weight_format
        self._has_warned = False

    @classmethod
    def open(
        cls,
        location: bool | Path,
        text_encoder_folder: TextEncoderCheckpoint,
        *,
        dtype: torch.dtype,
        device: str,
        weight_format: str = "",
    ) -> PromptCache:
        """The one in a folder; where: True is the folder `prompts` in `cache_home`, False is nowhere."""
        folder = Path(location).expanduser() if not isinstance(location, bool) else None
        if location is True:
            with suppress(RuntimeError):
                folder = cache_home() / FOLDER
        return cls(folder, text_encoder_folder, dtype=dtype, device=device, weight_format=weight_format)

    def look_up(self, tokens: PromptTokens) -> Tensor | None:
        """The rows (n, D) of the n real tokens, on the CPU; None where they are not there, or not whole."""
        try:
            path = self._path(tokens)
            if path is None or not path.is_file():
                return None
            rows = _read(path, (int(tokens.mask.sum()), self.text_encoder_folder.config.d_model))
        except (OSError, CheckpointError):
            return None
        if rows is not None:
            with suppress(OSError):
                os.utime(path)
        return rows

    def store(self, tokens: PromptTokens, embeddings: Tensor) -> None:
        """Remember the rows (n, D) of the n real tokens. Where nothing can be written, this does nothing."""
        try:
            path = self._path(tokens)
            if path is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            plain = embeddings.detach().cpu().contiguous()
            metadata = {_DIGEST_KEY: _digest(plain), "kadr": f"prompt {FORMAT_VERSION}"}
            write_tensors(path, {_EMBEDDINGS_KEY: plain}, dtype=plain.dtype, metadata=metadata)
        except (OSError, CheckpointError) as error:
            self._warn_once(error.__cause__ or error)
            return
        with suppress(OSError):  # another process may be at it too
            _prune(path.parent)

    def _warn_once(self, error: BaseException) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = getattr(error, "strerror", None) or error
            warnings.warn(
                f"encoded prompts cannot be kept in {self.folder} ({reason}), so they will be encoded again next time. "
                "Set KADR_CACHE to a folder that can be written to, or turn this off with --no-prompt-cache.",
                KadrWarning,
                stacklevel=3,
            )

    def _path(self, tokens: PromptTokens) -> Path | None:
        """Where the rows are, if they are there. Files are asked for their state each time: they may be replaced."""
        if self.folder is None:
            return None
        real = tokens.ids[tokens.mask].tolist()
        depends = [
            FORMAT_VERSION,
            _fingerprint(self.text_encoder_folder),
            str(self.dtype),
            self.device,
            self.weight_format,
            real,
        ]
        return self.folder / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.safetensors"


def _fingerprint(text_encoder_folder: TextEncoderCheckpoint) -> list[object]:
    """What tells the files of an encoder from others, and from what they were before they were changed."""
    infos = text_encoder_folder.source.infos
    stats = [(file.name, file.stat()) for file in sorted({info.file for info in infos.values()})]
    tensors = [
        (name, info.name, info.storage_type, info.shape, info.file_offset) for name, info in sorted(infos.items())
    ]
    return [
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        tensors,
        sorted(text_encoder_folder.source.metadata.items()),
        repr(text_encoder_folder.config),
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
    """Remove the files used longest ago that are too many, and no file that is not ours."""
    with os.scandir(folder) as entries:
        found = [(entry.stat(), Path(entry.path)) for entry in entries if _PROMPT_FILE_NAME.fullmatch(entry.name)]
    total = 0
    for stat, path in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > MAX_CACHE_BYTES:
            path.unlink(missing_ok=True)
