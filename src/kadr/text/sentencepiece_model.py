"""Reads and writes the pieces of a SentencePiece model file, without protobuf.

The file (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto) is a protocol buffer: a
sequence of fields, each a number and a value. A GGUF file has the same pieces as lists; written to a SentencePiece file
they give the same ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces; GGUF has the same numbers
UNIGRAM = 1  # the only model type that T5 uses

# Field numbers: of the file, of a piece, of the trainer spec, of the normalizer spec.
_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _TREAT_WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_PRECOMPILED_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class SentencePieceModel:
    """A unigram model.

    Args:
        pieces, scores, types: text, score and type of each piece, by id. A space is ▁.
        precompiled_charsmap: rules that normalize characters, in SentencePiece's compiled form; empty for none.
        add_dummy_prefix: a space is added before the text.
        remove_extra_whitespaces: spaces at both ends are dropped, and repeated ones merged.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def __post_init__(self) -> None:
        if not len(self.pieces) == len(self.scores) == len(self.types):
            counts = ", ".join(str(len(values)) for values in (self.pieces, self.scores, self.types))
            raise ValueError(f"pieces, scores and types differ in number: {counts}")

    def trim_fillers(self) -> tuple[SentencePieceModel, dict[str, int]]:
        """Removes the fillers (unused and user-defined pieces) at the end of the vocabulary.

        Returns:
            The model without them, and the ids of the user-defined ones by their text.
        """
        end = max((i + 1 for i, type_ in enumerate(self.types) if type_ not in (UNUSED, USER_DEFINED)), default=0)
        markers = {self.pieces[i]: i for i in range(end, len(self.pieces)) if self.types[i] == USER_DEFINED}
        return replace(self, pieces=self.pieces[:end], scores=self.scores[:end], types=self.types[:end]), markers


def serialize_sentencepiece(model: SentencePieceModel) -> bytes:
    """Returns the bytes of a SentencePiece model file."""
    fields = []
    for text, score, type_ in zip(model.pieces, model.scores, model.types, strict=True):
        piece = (
            _length_delimited(_PIECE_TEXT, text.encode())
            + _tag(_PIECE_SCORE, _FIXED32)
            + struct.pack("<f", score)
            + _varint_field(_PIECE_TYPE, type_)
        )
        fields.append(_length_delimited(_PIECE, piece))
    fields.append(
        _length_delimited(
            _TRAINER_SPEC, _varint_field(_MODEL_TYPE, UNIGRAM) + _varint_field(_BYTE_FALLBACK, BYTE in model.types)
        )
    )
    rules = _varint_field(_ADD_DUMMY_PREFIX, model.add_dummy_prefix) + _varint_field(
        _REMOVE_EXTRA_WHITESPACES, model.remove_extra_whitespaces
    )
    fields.append(
        _length_delimited(
            _NORMALIZER_SPEC, _length_delimited(_PRECOMPILED_CHARSMAP, model.precompiled_charsmap) + rules
        )
    )
    return b"".join(fields)


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Reads a SentencePiece model file.

    Raises:
        ValueError: it is not such a file, or has settings that `SentencePieceModel` cannot express.
    """
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    rows = []
    for number, value in _parse_fields(data):
        if number == _PIECE:
            piece = dict(_parse_fields(_require_bytes(value)))
            score = struct.unpack("<f", _require_bytes(piece.get(_PIECE_SCORE, bytes(4))))[0]
            rows.append(
                (_require_bytes(piece.get(_PIECE_TEXT, b"")).decode(), score, int(piece.get(_PIECE_TYPE, NORMAL)))
            )
        elif number in (_TRAINER_SPEC, _NORMALIZER_SPEC):
            (trainer if number == _TRAINER_SPEC else normalizer).update(_parse_fields(_require_bytes(value)))
    if trainer.get(_MODEL_TYPE, UNIGRAM) != UNIGRAM:
        raise ValueError("it is not a unigram model")
    if trainer.get(_TREAT_WHITESPACE_AS_SUFFIX, False) or not normalizer.get(_ESCAPE_WHITESPACES, True):
        raise ValueError("it treats spaces differently from T5")
    pieces, scores, types = zip(*rows, strict=True) if rows else ((), (), ())
    return SentencePieceModel(
        pieces,
        scores,
        types,
        precompiled_charsmap=_require_bytes(normalizer.get(_PRECOMPILED_CHARSMAP, b"")),
        add_dummy_prefix=bool(normalizer.get(_ADD_DUMMY_PREFIX, True)),
        remove_extra_whitespaces=bool(normalizer.get(_REMOVE_EXTRA_WHITESPACES, True)),
    )


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint_field(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _varint(value)


def _length_delimited(number: int, value: bytes) -> bytes:
    return _tag(number, _LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Encodes a number in seven bits a byte, the lowest first; the eighth bit says that more bytes follow."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _parse_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the fields of a message: number and value. Values of fixed width stay bytes."""
    offset = 0
    while offset < len(data):
        tag, offset = _read_varint(data, offset)
        if tag & 7 == _VARINT:
            value, offset = _read_varint(data, offset)
            yield tag >> 3, value
            continue
        if tag & 7 == _LENGTH_DELIMITED:
            size, offset = _read_varint(data, offset)
        elif tag & 7 in (_FIXED32, _FIXED64):
            size = 4 if tag & 7 == _FIXED32 else 8
        else:
            raise ValueError(f"a field has the unsupported wire type {tag & 7}")
        if offset + size > len(data):
            raise ValueError("it is cut short")
        yield tag >> 3, data[offset : offset + size]
        offset += size


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if offset == len(data) or shift > 63:
            raise ValueError("it is cut short")
        byte, offset = data[offset], offset + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, offset


def _require_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number, where bytes are expected")
    return value
