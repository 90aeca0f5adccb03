"""Fields of a text encoder in a GGUF file, as llama.cpp's converter writes T5: config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kadr.checkpoints.gguf.header import T5_ENCODER_ARCHITECTURE, GGUFHeader, read_gguf_header
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import TEXT_ENCODER_GGUF
from kadr.models.t5 import T5Config
from kadr.quoting import quote
from kadr.text.sentencepiece_model import UNUSED, SentencePieceModel
from kadr.text.tokenizer import EOS_ID, PAD_ID, UNKNOWN_ID

EMBEDDING_KEY = "token_embd.weight"
CONTEXT_LENGTH = 512  # tokens that T5 was trained on; informative, nothing depends on it
_CONFIG_FIELDS: Mapping[str, str] = {  # field of T5Config -> GGUF field
    "d_model": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "d_kv": "attention.key_length",
    "d_ff": "feed_forward_length",
    "relative_attention_num_buckets": "attention.relative_buckets_count",
    "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
}
_TOKENIZER_PREFIX = "tokenizer.ggml."
_PADDING_SCORE = -10000.0


def open_gguf_text_encoder(path: Path) -> tuple[T5Config, Source]:
    """Reads the header of a text encoder's GGUF file.

    Returns:
        The encoder's config, and its tensors under llama.cpp's names (`keys.T5_GGUF_KEYS`).

    Raises:
        CheckpointError: it is not a T5 encoder, or a field of its config is missing.
    """
    header = read_gguf_header(path)
    if header.architecture != T5_ENCODER_ARCHITECTURE and EMBEDDING_KEY not in header.infos:
        raise CheckpointError(
            f"{path} is not a text encoder: its architecture is {header.architecture}, and it has no {EMBEDDING_KEY}. "
            f"Give a transformer as --model, and as the text encoder {TEXT_ENCODER_GGUF}."
        )
    return _read_config(header), Source(path, header.infos, header.metadata)


def read_gguf_pieces(path: Path) -> SentencePieceModel | None:
    """Reads the pieces of the tokenizer in a GGUF file; returns None if it has no tokenizer.

    Raises:
        CheckpointError: the tokenizer is not T5's, or is incomplete.
    """
    header = read_gguf_header(path)
    tokenizer_model = header.fields.get(f"{_TOKENIZER_PREFIX}model")
    if tokenizer_model is None:
        return None
    tokens, scores, types = (header.read_array(_TOKENIZER_PREFIX + name) for name in ("tokens", "scores", "token_type"))
    if tokenizer_model != "t5" or tokens is None or scores is None or types is None:
        raise CheckpointError(
            f"{path} has a tokenizer that is not T5's, or is incomplete (its model is {quote(tokenizer_model)}). Use "
            f"another file of the encoder, such as {TEXT_ENCODER_GGUF}."
        )
    try:
        return SentencePieceModel(
            tuple(tokens),
            tuple(scores),
            tuple(types),
            precompiled_charsmap=bytes(header.read_array(f"{_TOKENIZER_PREFIX}precompiled_charsmap") or b""),
            add_dummy_prefix=bool(header.fields.get(f"{_TOKENIZER_PREFIX}add_space_prefix", True)),
            remove_extra_whitespaces=bool(header.fields.get(f"{_TOKENIZER_PREFIX}remove_extra_whitespaces", True)),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error}. Download it again.") from error


def text_encoder_fields(config: T5Config, pieces: SentencePieceModel) -> dict[str, Any]:
    """Builds llama.cpp's fields for an encoder and its tokenizer, padded to the encoder's vocabulary."""
    config_fields = {
        f"{T5_ENCODER_ARCHITECTURE}.{name}": getattr(config, field) for field, name in _CONFIG_FIELDS.items()
    }
    padding = range(len(pieces.pieces), config.vocab_size)
    tokenizer_fields = {
        "model": "t5",
        "pre": "default",
        "tokens": [*pieces.pieces, *(f"[PAD{i}]" for i in padding)],
        "scores": [*pieces.scores, *(_PADDING_SCORE for _ in padding)],
        "token_type": [*pieces.types, *(UNUSED for _ in padding)],
        "add_space_prefix": pieces.add_dummy_prefix,
        "remove_extra_whitespaces": pieces.remove_extra_whitespaces,
        "eos_token_id": EOS_ID,
        "unknown_token_id": UNKNOWN_ID,
        "padding_token_id": PAD_ID,
        "add_bos_token": False,
        "add_eos_token": True,
    }
    if pieces.precompiled_charsmap:
        tokenizer_fields["precompiled_charsmap"] = pieces.precompiled_charsmap
    return {
        f"{T5_ENCODER_ARCHITECTURE}.context_length": CONTEXT_LENGTH,
        **config_fields,
        f"{T5_ENCODER_ARCHITECTURE}.attention.value_length": config.d_kv,
        f"{T5_ENCODER_ARCHITECTURE}.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        **{_TOKENIZER_PREFIX + name: value for name, value in tokenizer_fields.items()},
    }


def _read_config(header: GGUFHeader) -> T5Config:
    values = {field: header.fields.get(f"{T5_ENCODER_ARCHITECTURE}.{name}") for field, name in _CONFIG_FIELDS.items()}
    fields_with_defaults = ("relative_attention_num_buckets", "layer_norm_epsilon")
    missing = [
        _CONFIG_FIELDS[field] for field, value in values.items() if value is None and field not in fields_with_defaults
    ]
    if missing or EMBEDDING_KEY not in header.infos:
        raise CheckpointError(
            f"{header.path} lacks {', '.join(missing) or EMBEDDING_KEY} of a T5 encoder. Use {TEXT_ENCODER_GGUF}."
        )
    try:
        vocab_size = header.infos[EMBEDDING_KEY].shape[0]
        return T5Config(vocab_size=vocab_size, **{field: value for field, value in values.items() if value is not None})
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from error
