"""Prompt to token ids, as the text encoder was trained on them.

The released tokenizer is a SentencePiece unigram model (Kudo and Richardson 2018, arXiv:1808.06226). It is published as
`spiece.model` and, converted, as `tokenizer.json` or inside of a GGUF file; any will do, and all give the same ids.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import sentencepiece
import tokenizers
import torch
from torch import Tensor

from kadr.errors import CheckpointError, RequestError
from kadr.text.sentencepiece_model import SentencePieceModel, serialize_sentencepiece

MAX_SEQUENCE_LENGTH = 256  # tokens; what the released transformers were trained on
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_SPECIAL_TOKENS = {"<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNKNOWN_ID}
# The released SentencePiece model stops before T5's hundred sentinels; its users number them downwards from the end.
_RELEASED_PIECES = 32000
_SENTINELS = {f"<extra_id_{n}>": _RELEASED_PIECES + 99 - n for n in range(100)}
_FILE_NAMES = ("spiece.model", "tokenizer.json")  # the original first, the conversion second
_ADVICE = "Put spiece.model from google/t5-v1_1-xxl, or the tokenizer folder of Lightricks/LTX-Video, there."


class PromptTokens(NamedTuple):
    """One prompt, tokenized.

    Fields:
        ids: int64 (1, 256), padded at the end with 0. The last real token is 1, the end of the sequence.
        mask: bool (1, 256), true where a token is real.
        truncated_text: the end of the prompt, from the first word that did not fit whole; "" when all of it fitted.
    """

    ids: Tensor
    mask: Tensor
    truncated_text: str


class Tokenizer:
    """Turns prompts into ids. Made by `Tokenizer.open` or `Tokenizer.from_sentencepiece`.

    Args:
        text_to_ids: text to ids, without an end of sequence.
        vocab_size: one more than the largest id it gives; the encoder's vocabulary must hold as many.
    """

    def __init__(self, text_to_ids: Callable[[str], list[int]], vocab_size: int) -> None:
        self._text_to_ids = text_to_ids
        self.vocab_size = vocab_size

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `spiece.model` or `tokenizer.json`.

        Args:
            path: one of the two files; or a folder, in which case they are looked for there, in its `tokenizer` and in
                the `tokenizer` beside it; or any other file, which stands for its folder.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is not T5's.
        """
        file = find_tokenizer_file(path)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read: {error.strerror}. Make it readable, or name another."
            ) from error
        return cls(*(_from_json if file.suffix == ".json" else _from_sentencepiece)(data, file))

    @classmethod
    def from_sentencepiece(cls, model: SentencePieceModel, file: Path) -> Tokenizer:
        """Take a vocabulary that comes with the weights.

        Args:
            model: to the end of the encoder's vocabulary.
            file: where they come from, for messages.

        Raises:
            CheckpointError: it is not T5's.
        """
        kept, markers = model.trim_fillers()
        return cls(*_from_sentencepiece(serialize_sentencepiece(kept), file, markers))

    def encode(self, prompt: str) -> PromptTokens:
        """Tokenize one prompt: surrounding space is dropped, nothing else is cleaned. "" is a lone end of sequence.

        Raises:
            RequestError: the prompt is not text that can be written down as UTF-8.
        """
        text = prompt.strip()
        _check_characters(text)
        numbers = self._text_to_ids(text)
        kept = numbers[: MAX_SEQUENCE_LENGTH - 1]
        if kept[-1:] != [EOS_ID]:  # a prompt that ends in a literal </s> does not get a second one
            kept.append(EOS_ID)
        ids = torch.full((1, MAX_SEQUENCE_LENGTH), PAD_ID, dtype=torch.int64)
        ids[0, : len(kept)] = torch.tensor(kept)
        mask = (torch.arange(MAX_SEQUENCE_LENGTH) < len(kept))[None]
        return PromptTokens(ids, mask, self._truncated_text(text) if len(numbers) > MAX_SEQUENCE_LENGTH - 1 else "")

    def _truncated_text(self, text: str) -> str:
        """The end of a text that is too long. No token spans two words, so a count of tokens grows word by word."""
        words = list(re.finditer(r"\S+", text))
        whole = bisect_right(
            words, MAX_SEQUENCE_LENGTH - 1, key=lambda word: len(self._text_to_ids(text[: word.end()]))
        )
        return text[words[whole].start() :]


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The prompt holds half a character, {text[error.start]!r}, at position {error.start}; "
            "it was cut or decoded wrongly on its way here. Send the prompt as UTF-8."
        ) from error


def find_tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """The `spiece.model` or `tokenizer.json` that `Tokenizer.open` reads."""
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, so there is no tokenizer in it. Check the path.")
    if path.is_file() and (path.name in _FILE_NAMES or path.suffix == ".model"):
        return path
    folder = path if path.is_dir() else path.parent
    folders = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    candidates: Iterator[Path] = (place / name for place in folders for name in _FILE_NAMES)
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        places = ", ".join(map(str, folders))
        raise CheckpointError(f"There is no tokenizer for {path}: no {' or '.join(_FILE_NAMES)} in {places}. {_ADVICE}")
    return found


def _from_sentencepiece(
    data: bytes, file: Path, extra_markers: Mapping[str, int] = MappingProxyType({})
) -> tuple[Callable[[str], list[int]], int]:
    """SentencePiece knows no markers in running text, so they are taken out before it. more: of them, with ids."""
    try:
        if not data:  # which SentencePiece takes for "load nothing"
            raise RuntimeError("the file is empty")
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise _unreadable_error(file, len(data), "SentencePiece model", error) from error
    _check_family(file, processor.pad_id(), processor.eos_id(), processor.unk_id())
    size = processor.get_piece_size()
    markers = {**(_SENTINELS if size == _RELEASED_PIECES else {}), **extra_markers, **_SPECIAL_TOKENS}
    splitter = re.compile("(" + "|".join(map(re.escape, markers)) + ")")

    def numbers(text: str) -> list[int]:
        parts = ([markers[part]] if part in markers else processor.encode(part) for part in splitter.split(text))
        return [number for part in parts for number in part]

    return numbers, max(size, *(number + 1 for number in markers.values()))


def _from_json(data: bytes, file: Path) -> tuple[Callable[[str], list[int]], int]:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise _unreadable_error(file, len(data), "tokenizer of the tokenizers library", error) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_family(file, *(tokenizer.token_to_id(marker) for marker in _SPECIAL_TOKENS))

    def numbers(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return numbers, tokenizer.get_vocab_size()


def _unreadable_error(file: Path, size: int, kind: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} ({size} bytes) is not a {kind}: {error}. "
        f"It may be cut short, or a git-lfs pointer instead of the file. {_ADVICE}"
    )


def _check_family(file: Path, pad: int | None, eos: int | None, unknown: int | None) -> None:
    if (pad, eos, unknown) != (PAD_ID, EOS_ID, UNKNOWN_ID):
        raise CheckpointError(
            f"{file} is not T5's tokenizer: it numbers <pad>, </s>, <unk> as {pad}, {eos}, {unknown}; "
            f"T5's are {PAD_ID}, {EOS_ID}, {UNKNOWN_ID}. {_ADVICE}"
        )
