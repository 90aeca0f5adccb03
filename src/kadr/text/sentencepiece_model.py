"""The pieces that SentencePiece cuts text into, out of its own file and back into one.

The file (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto) is a protocol buffer: a
row of fields, each a number and a value. A GGUF file has the same pieces as lists; put into a file of SentencePiece's
they give the ids that it would give.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces; GGUF has the same numbers
UNIGRAM = 1  # the only algorithm that T5 uses

# Numbers of fields, and of the parts of a piece, of the trainer's settings and of the normalizer's.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_ALGORITHM, _SPACE_BEHIND, _BYTES = 3, 24, 35
_CHARSMAP, _ADD_SPACE, _SQUEEZE, _MARK_SPACE = 2, 3, 4, 5
_VARINT, _FIXED64, _SIZED, _FIXED32 = 0, 1, 2, 5  # how a value is written


@dataclass(frozen=True)
class Pieces:
    """A unigram model.

    Args:
        texts, scores, kinds: of each piece, by id. A space is ▁.
        charsmap: rules that normalize characters, in SentencePiece's compiled form; empty for none.
        add_space: text begins with a space.
        squeeze: spaces at both ends are dropped, and several are one.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    charsmap: bytes = b""
    add_space: bool = True
    squeeze: bool = True

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.scores) == len(self.kinds):
            counts = ", ".join(str(len(part)) for part in (self.texts, self.scores, self.kinds))
            raise ValueError(f"texts, scores and kinds of pieces differ in number: {counts}")

    def cut(self) -> tuple[Pieces, dict[str, int]]:
        """Without what only fills up the vocabulary behind the last piece that text is made of; and, of that, the
        texts that stand for themselves, with their ids."""
        end = max((i + 1 for i, kind in enumerate(self.kinds) if kind not in (UNUSED, USER_DEFINED)), default=0)
        markers = {self.texts[i]: i for i in range(end, len(self.texts)) if self.kinds[i] == USER_DEFINED}
        return replace(self, texts=self.texts[:end], scores=self.scores[:end], kinds=self.kinds[:end]), markers


def write_pieces(pieces: Pieces) -> bytes:
    """As a file of SentencePiece's."""
    made = []
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        piece = _sized(_TEXT, text.encode()) + _tag(_SCORE, _FIXED32) + struct.pack("<f", score) + _number(_KIND, kind)
        made.append(_sized(_PIECE, piece))
    made.append(_sized(_TRAINER, _number(_ALGORITHM, UNIGRAM) + _number(_BYTES, BYTE in pieces.kinds)))
    rules = _number(_ADD_SPACE, pieces.add_space) + _number(_SQUEEZE, pieces.squeeze)
    made.append(_sized(_NORMALIZER, _sized(_CHARSMAP, pieces.charsmap) + rules))
    return b"".join(made)


def read_pieces(data: bytes) -> Pieces:
    """Out of a file of SentencePiece's.

    Raises:
        ValueError: it is none, or works in a way that only SentencePiece's own file can say.
    """
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    rows = []
    for number, value in _fields(data):
        if number == _PIECE:
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(piece.get(_SCORE, bytes(4))))[0]
            rows.append((_bytes(piece.get(_TEXT, b"")).decode(), score, int(piece.get(_KIND, NORMAL))))
        elif number in (_TRAINER, _NORMALIZER):
            (trainer if number == _TRAINER else normalizer).update(_fields(_bytes(value)))
    if trainer.get(_ALGORITHM, UNIGRAM) != UNIGRAM:
        raise ValueError("it is no unigram model")
    if trainer.get(_SPACE_BEHIND, False) or not normalizer.get(_MARK_SPACE, True):
        raise ValueError("it treats spaces in another way than T5")
    texts, scores, kinds = zip(*rows, strict=True) if rows else ((), (), ())
    return Pieces(
        texts,
        scores,
        kinds,
        charsmap=_bytes(normalizer.get(_CHARSMAP, b"")),
        add_space=bool(normalizer.get(_ADD_SPACE, True)),
        squeeze=bool(normalizer.get(_SQUEEZE, True)),
    )


def _tag(number: int, way: int) -> bytes:
    return _varint(number << 3 | way)


def _number(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _varint(value)


def _sized(number: int, value: bytes) -> bytes:
    return _tag(number, _SIZED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value. The value of a fixed width is left as its bytes."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        if tag & 7 == _VARINT:
            value, place = _read_varint(data, place)
            yield tag >> 3, value
            continue
        if tag & 7 == _SIZED:
            size, place = _read_varint(data, place)
        elif tag & 7 in (_FIXED32, _FIXED64):
            size = 4 if tag & 7 == _FIXED32 else 8
        else:
            raise ValueError(f"a field is written in way {tag & 7}")
        if place + size > len(data):
            raise ValueError("it is cut short")
        yield tag >> 3, data[place : place + size]
        place += size


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place == len(data) or shift > 63:
            raise ValueError("it is cut short")
        byte, place = data[place], place + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, place


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where text should")
    return value
