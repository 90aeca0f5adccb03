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

FORMAT = 1  # part of every name: with another number, all files of before are strangers
LARGEST = 512_000_000  # bytes of all files; those used longest ago go first
FOLDER = "prompts"
_ROWS, _DIGEST = "encoding", "sha256"
_OURS = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.\d+\.part)?")


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
        text: the encoder. Names, sizes and times of change of its files count, not where they lie.
        dtype: that is computed in.
        device: such as "cpu" or "cuda"; the last bits differ from one to the other.
        held: how its weights are held, where that changes the numbers.
    """

    def __init__(
        self, folder: Path | None, text: TextEncoderCheckpoint, *, dtype: torch.dtype, device: str, held: str = ""
    ) -> None:
        self.folder, self.text = folder, text
        self.dtype, self.device, self.held = dtype, device, held
        self._warned = False

    @classmethod
    def of(
        cls, where: bool | Path, text: TextEncoderCheckpoint, *, dtype: torch.dtype, device: str, held: str = ""
    ) -> PromptCache:
        """The one in a folder; where: True is the folder `prompts` in `cache_home`, False is nowhere."""
        folder = Path(where).expanduser() if not isinstance(where, bool) else None
        if where is True:
            with suppress(RuntimeError):
                folder = cache_home() / FOLDER
        return cls(folder, text, dtype=dtype, device=device, held=held)

    def find(self, tokens: PromptTokens) -> Tensor | None:
        """The rows (n, D) of the n real tokens, on the CPU; None where they are not there, or not whole."""
        try:
            path = self._path(tokens)
            if path is None or not path.is_file():
                return None
            rows = _read(path, (int(tokens.mask.sum()), self.text.config.d_model))
        except (OSError, CheckpointError):
            return None
        if rows is not None:
            with suppress(OSError):
                os.utime(path)
        return rows

    def keep(self, tokens: PromptTokens, rows: Tensor) -> None:
        """Remember the rows (n, D) of the n real tokens. Where nothing can be written, this does nothing."""
        try:
            path = self._path(tokens)
            if path is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            plain = rows.detach().cpu().contiguous()
            metadata = {_DIGEST: _digest(plain), "kadr": f"prompt {FORMAT}"}
            write_tensors(path, {_ROWS: plain}, dtype=plain.dtype, metadata=metadata)
        except (OSError, CheckpointError) as error:
            self._warn(error.__cause__ or error)
            return
        with suppress(OSError):  # another process may be at it too
            _prune(path.parent)

    def _warn(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
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
        depends = [FORMAT, _identity(self.text), str(self.dtype), self.device, self.held, real]
        return self.folder / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.safetensors"


def _identity(text: TextEncoderCheckpoint) -> list[object]:
    """What tells the files of an encoder from others, and from what they were before they were changed."""
    infos = text.source.infos
    stats = [(file.name, file.stat()) for file in sorted({info.file for info in infos.values()})]
    tensors = [
        (name, info.name, info.storage_type, info.shape, info.file_offset) for name, info in sorted(infos.items())
    ]
    return [
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        tensors,
        sorted(text.source.metadata.items()),
        repr(text.config),
    ]


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    source = Source.open(path)
    info = source.infos.get(_ROWS)
    if info is None or info.shape != shape or info.dtype not in DTYPES.values():
        return None
    rows = source.read(_ROWS).clone()
    return rows if source.metadata.get(_DIGEST) == _digest(rows) else None


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.view(torch.uint8).numpy().data).hexdigest()


def _prune(folder: Path) -> None:
    """Remove the files used longest ago that are too many, and no file that is not ours."""
    with os.scandir(folder) as entries:
        found = [(entry.stat(), Path(entry.path)) for entry in entries if _OURS.fullmatch(entry.name)]
    total = 0
    for stat, path in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > LARGEST:
            path.unlink(missing_ok=True)
