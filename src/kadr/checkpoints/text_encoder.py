"""A text encoder: described from its header at once; module and tokenizer load on demand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from kadr.checkpoints.checkpoint import ComponentDescription, describe_component
from kadr.checkpoints.detect.diffusers_folder import read_json
from kadr.checkpoints.detect.split import COMPONENT_PREFIXES, TEXT_ENCODER_COMPONENT
from kadr.checkpoints.detect.t5_file import find_t5_prefix, open_t5_file
from kadr.checkpoints.gguf.header import T5_ENCODER_ARCHITECTURE, is_gguf, read_gguf_header
from kadr.checkpoints.gguf.t5_fields import open_gguf_text_encoder, read_gguf_pieces
from kadr.checkpoints.keys import T5_GGUF_KEYS, T5_KEYS, Key
from kadr.checkpoints.load import load_text_encoder
from kadr.checkpoints.source import Source, join_first
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Config, T5Encoder
from kadr.text.sentencepiece_model import SentencePieceModel
from kadr.text.tokenizer import Tokenizer, find_tokenizer_file


@dataclass(frozen=True)
class TextEncoderCheckpoint:
    """A T5 encoder and its tokenizer, opened by their headers or predicted (`checkpoints.predict`).

    Args:
        path: folder of the weights and config.json; or a .gguf, which has everything in it; or a .safetensors. Of a
            predicted one, the file or the pattern of files in its repository.
        tokenizer_root: folder in which the tokenizer is looked for; the file itself where `path` is one.
        key_table: table of the file keys in `source`.
        tokenizer_path: a tokenizer from elsewhere, for an encoder without one.
    """

    path: Path
    tokenizer_root: Path
    config: T5Config
    source: Source
    key_table: tuple[Key, ...] = T5_KEYS
    tokenizer_path: Path | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TextEncoderCheckpoint:
        """Reads config and headers, no tensor.

        Args:
            path: the encoder's own folder, with the tokenizer in it or in a folder `tokenizer` in or beside it; or
                the folder that has `text_encoder` and `tokenizer` in it; or a .gguf; or a .safetensors of the encoder,
                or of a model with the encoder in it, with the tokenizer beside it.

        Raises:
            CheckpointError: it is not a text encoder that kadr runs.
        """
        home = Path(path)
        if is_gguf(home):
            return cls(home, home, *open_gguf_text_encoder(home), key_table=T5_GGUF_KEYS)
        if home.is_file():
            return cls(home, home, *open_t5_file(home))
        folder = home / "text_encoder" if (home / "text_encoder").is_dir() else home
        if not (folder / "config.json").is_file():
            state = "has no config.json" if folder.is_dir() else "is neither a folder nor a file"
            raise CheckpointError(
                f"{folder} {state}, so it is not a text encoder. Give the folder with text_encoder/ and tokenizer/ in "
                f"it, such as that of PixArt-alpha/PixArt-XL-2-1024-MS, or a file of the encoder{_files_in(folder)}."
            )
        try:
            config = T5Config.from_header(read_json(folder / "config.json"))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        return cls(folder, home, config, Source.open(folder))

    @property
    def is_on_disk(self) -> bool:
        """False for a predicted encoder, of which neither weights nor tokenizer can be loaded."""
        return self.source.is_on_disk

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes

    def load(self, dtype: torch.dtype | None = None, *, keep_storage_dtype: bool = False) -> T5Encoder:
        """Loads the encoder on the CPU; tensors already stored in `dtype` share memory with the files.

        Args:
            dtype: None keeps the stored dtypes.
            keep_storage_dtype: see `load.load_weights`.

        Raises:
            CheckpointError: it is not on disk, or its tensors do not fit the config; see `load.load_weights`.
        """
        return load_text_encoder(
            self.config, self.source, dtype=dtype, keep_storage_dtype=keep_storage_dtype, key_table=self.key_table
        )

    def load_tokenizer(self) -> Tokenizer:
        """Loads the encoder's tokenizer.

        Raises:
            CheckpointError: it is not on disk, there is none, or the encoder's vocabulary is too small for it.
        """
        self.source.refuse_absent()
        pieces = self._stored_pieces()
        tokenizer = (
            Tokenizer.from_sentencepiece(pieces, self.path)
            if pieces is not None
            else Tokenizer.open(self.tokenizer_path or self.tokenizer_root)
        )
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.tokenizer_root} has token ids up to {tokenizer.vocab_size - 1}, the encoder's "
                f"vocabulary ends at {self.config.vocab_size - 1}. Use tokenizer and encoder of the same release."
            )
        return tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """True if a tokenizer is in the file or beside the encoder, or was found elsewhere."""
        if self.tokenizer_path is not None or self._stored_pieces() is not None:
            return True
        try:
            return find_tokenizer_file(self.tokenizer_root).is_file()
        except CheckpointError:
            return False

    def _stored_pieces(self) -> SentencePieceModel | None:
        return read_gguf_pieces(self.path) if is_gguf(self.path) else None

    def describe(self) -> ComponentDescription:
        """Describes the encoder from its header."""
        config = self.config
        sizes = {"num_layers": config.num_layers, "d_model": config.d_model, "vocab_size": config.vocab_size}
        return describe_component("text encoder", self.source, sizes)


def is_text_encoder(path: Path) -> bool:
    """Returns whether a path is a text encoder and not a model."""
    if not path.is_dir():
        if is_gguf(path):
            return read_gguf_header(path).architecture == T5_ENCODER_ARCHITECTURE
        return path.suffix == ".safetensors" and _is_text_encoder_file(path)
    if (path / "transformer").exists() or (path / "vae").exists():
        return False
    if (path / "text_encoder").is_dir():
        return True
    try:
        return read_json(path / "config.json").get("model_type") == "t5"
    except CheckpointError:
        return False


def _is_text_encoder_file(path: Path) -> bool:
    """Returns whether a .safetensors has a T5 encoder and no component of a model."""
    try:
        infos = Source.open(path).infos
    except CheckpointError:
        return False  # whoever opens it reports the error
    of_model = tuple(prefix for prefix, kind in COMPONENT_PREFIXES.items() if kind != TEXT_ENCODER_COMPONENT)
    return find_t5_prefix(infos) is not None and not any(name.startswith(of_model) for name in infos)


def _files_in(folder: Path) -> str:
    """Names the files in a folder that may be a text encoder, for an error."""
    files = sorted(entry.name for suffix in ("*.safetensors", "*.gguf") for entry in folder.glob(suffix))
    return f", such as one of those in it: {join_first(files)}" if files else ", a .safetensors or a .gguf"
