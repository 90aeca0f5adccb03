"""Tokenizer: prompt to token ids, as the text encoder was trained on them.

The released tokenizer is a SentencePiece unigram model (Kudo and Richardson 2018, arXiv:1808.06226). It is published as
`spiece.model` and, converted, as `tokenizer.json` or inside a GGUF file; all of them give the same ids.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
import torch
from torch import Tensor

from kadr.errors import CheckpointError, RequestError
from kadr.json_reader import parse_json
from kadr.quoting import quote
from kadr.regular_file import read_bytes
from kadr.text.sentencepiece_model import SentencePieceModel, serialize_sentencepiece

MAX_TOKENIZER_BYTES = 32_000_000  # T5's spiece.model has 0.8 MB, and its tokenizer.json 2.4
MAX_SEQUENCE_LENGTH = 256  # tokens, as the released transformers were trained
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_SPECIAL_TOKENS = {"<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNKNOWN_ID}
# The released SentencePiece model ends before T5's hundred sentinels; its users number them downwards from the end.
_RELEASED_PIECES = 32000
_SENTINELS = {f"<extra_id_{n}>": _RELEASED_PIECES + 99 - n for n in range(100)}
_FILE_NAMES = ("spiece.model", "tokenizer.json")  # the original first, the conversion second
_ADVICE = "Put spiece.model from google/t5-v1_1-xxl, or the tokenizer folder of Lightricks/LTX-Video, there."


class PromptTokens(NamedTuple):
    """One prompt, tokenized.

    Fields:
        ids: int64 (1, 256), padded at the end with 0. The last real token is 1, the end of the sequence.
        mask: bool (1, 256), true where a token is not padding.
        truncated_text: the end of the prompt, from the first word that does not fit whole; "" if all of it fits.
        num_tokens: of the whole prompt, with the end of the sequence: above 256 if it is truncated.
    """

    ids: Tensor
    mask: Tensor
    truncated_text: str
    num_tokens: int


class Tokenizer:
    """T5's tokenizer. Made by `Tokenizer.open` or `Tokenizer.from_sentencepiece`.

    Args:
        text_to_ids: text to ids, without an end of sequence.
        vocab_size: one more than the largest id; the text encoder's vocabulary must be at least as large.
    """

    def __init__(self, text_to_ids: Callable[[str], list[int]], vocab_size: int) -> None:
        self._text_to_ids = text_to_ids
        self.vocab_size = vocab_size

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads `spiece.model` or `tokenizer.json`.

        Args:
            path: one of the two files; or a folder, searched together with its `tokenizer` and the `tokenizer` beside
                it; or any other file, which stands for its folder.

        Raises:
            CheckpointError: there is no tokenizer, it cannot be read, or it is not T5's.
        """
        file = find_tokenizer_file(path)
        try:
            data = read_bytes(file, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read: {error.strerror}. Make it readable, or name another."
            ) from error
        return cls(*(_from_json if file.suffix == ".json" else _from_sentencepiece)(data, file))

    @classmethod
    def from_sentencepiece(cls, model: SentencePieceModel, file: Path) -> Tokenizer:
        """Makes a tokenizer from a vocabulary that comes with the weights.

        Args:
            model: as long as the text encoder's vocabulary.
            file: that it comes from, for messages.

        Raises:
            CheckpointError: it is not T5's.
        """
        trimmed, markers = model.trim_fillers()
        return cls(*_from_sentencepiece(serialize_sentencepiece(trimmed), file, markers))

    def encode(self, prompt: str, length: int = MAX_SEQUENCE_LENGTH) -> PromptTokens:
        """Tokenizes one prompt: surrounding space is dropped, nothing else is cleaned. "" is a lone end of sequence.

        Args:
            length: tokens that it is truncated and padded to, instead of 256.

        Raises:
            RequestError: the prompt cannot be encoded as UTF-8.
        """
        text = prompt.strip()
        _check_characters(text)
        text_ids = self._text_to_ids(text)
        fitting = text_ids[: length - 1]
        if fitting[-1:] != [EOS_ID]:  # a prompt that ends in a literal </s> does not get a second one
            fitting.append(EOS_ID)
        ids = torch.full((1, length), PAD_ID, dtype=torch.int64)
        ids[0, : len(fitting)] = torch.tensor(fitting)
        mask = (torch.arange(length) < len(fitting))[None]
        truncated_text = self._truncated_text(text, length) if len(text_ids) > length - 1 else ""
        return PromptTokens(ids, mask, truncated_text, len(text_ids) + (text_ids[-1:] != [EOS_ID]))

    def _truncated_text(self, text: str, length: int) -> str:
        """Returns the end of a text that is too long. No token spans two words, so token counts grow word by word."""
        words = list(re.finditer(r"\S+", text))
        fitting_words = bisect_right(words, length - 1, key=lambda word: len(self._text_to_ids(text[: word.end()])))
        return text[words[fitting_words].start() :]


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The prompt contains half a character, {quote(text[error.start])}, at position {error.start}; "
            "it was cut or decoded wrongly before it came here. Send the prompt as UTF-8."
        ) from error


def find_tokenizer_file(path: str | os.PathLike[str]) -> Path:
    """Returns the path of the `spiece.model` or `tokenizer.json` that `Tokenizer.open` reads."""
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, so there is no tokenizer in it. Check the path.")
    if path.is_file() and (path.name in _FILE_NAMES or path.suffix == ".model"):
        return path
    folder = path if path.is_dir() else path.parent
    folders = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    candidates: Iterator[Path] = (candidate / name for candidate in folders for name in _FILE_NAMES)
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        names = " or ".join(_FILE_NAMES)
        raise CheckpointError(
            f"There is no tokenizer for {path}: no {names} in {folder}, in tokenizer/ there, or in tokenizer/ beside "
            f"it. {_ADVICE}"
        )
    return file


def _from_sentencepiece(
    data: bytes, file: Path, extra_markers: Mapping[str, int] = MappingProxyType({})
) -> tuple[Callable[[str], list[int]], int]:
    """Returns a function from text to ids, and the size of its vocabulary.

    SentencePiece does not recognize markers in running text, so the text is split at them first.

    Args:
        extra_markers: further markers, with their ids.
    """
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

    def text_to_ids(text: str) -> list[int]:
        parts = ([markers[part]] if part in markers else processor.encode(part) for part in splitter.split(text))
        return [token_id for part in parts for token_id in part]

    return text_to_ids, max(size, *(token_id + 1 for token_id in markers.values()))


def _from_json(data: bytes, file: Path) -> tuple[Callable[[str], list[int]], int]:
    _refuse_growth(data, file)
    with _explain_failures(file, len(data)):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_family(file, *(tokenizer.token_to_id(marker) for marker in _SPECIAL_TOKENS))

    def text_to_ids(text: str) -> list[int]:
        with _explain_failures(file, len(data)):
            return tokenizer.encode(text, add_special_tokens=False).ids

    return text_to_ids, tokenizer.get_vocab_size()


@contextmanager
def _explain_failures(file: Path, size: int) -> Iterator[None]:
    """Explains what the tokenizers library raises in the block, for a file of so many bytes."""
    try:
        yield
    except BaseException as error:  # the library raises no narrower class, and where it panics not even an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _unreadable_error(file, size, "tokenizer of the tokenizers library", error) from error


def _refuse_growth(data: bytes, file: Path) -> None:
    """Refuses rules that make a text longer: a few dozen that double it fill memory, and the library then aborts.

    Those of T5 replace spaces by one character.

    Raises:
        CheckpointError: it has such a rule, or is not JSON.
    """
    try:
        config = parse_json(data)
    except ValueError as error:
        raise _unreadable_error(file, len(data), "tokenizer of the tokenizers library", error) from error
    unread: list[Any] = [config.get("normalizer"), config.get("pre_tokenizer")] if isinstance(config, dict) else []
    while unread:
        rule = unread.pop()
        unread += rule.values() if isinstance(rule, dict) else rule if isinstance(rule, list) else ()
        for key in ("content", "prepend") if isinstance(rule, dict) else ():
            if isinstance(rule.get(key), str) and len(rule[key]) > 1:
                raise CheckpointError(
                    f"{file} is not T5's tokenizer: it replaces or adds text by {quote(rule[key])}, more than one "
                    f"character. {_ADVICE}"
                )


def _unreadable_error(file: Path, size: int, kind: str, error: BaseException) -> CheckpointError:
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
