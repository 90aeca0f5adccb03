"""Names of the videos of a batch: 007-a-red-circle-moving.mp4, or the name that a row gives."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kadr.batch.row import BatchRow
from kadr.errors import RequestError
from kadr.file_names import is_allowed_name
from kadr.quoting import quote
from kadr.validation import MAX_NAME_BYTES

VIDEO_SUFFIX = ".mp4"
_MIN_DIGITS = 3  # of a row's number
_MAX_WORDS, _MAX_WORDS_BYTES = 40, 160  # characters and bytes of a prompt in a name
_MAX_OUTPUT_BYTES = MAX_NAME_BYTES - 16  # a number may have to follow


def check_output_name(value: Any) -> str:
    """Returns the name that a row gives to its video; .mp4 is added where it has no ending.

    Raises:
        RequestError: it is no plain name of an .mp4, or one that this system does not allow.
    """
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"output is {quote(value)}; it must be the name of a file, such as clip{VIDEO_SUFFIX}.")
    name = value if value.lower().endswith(VIDEO_SUFFIX) else f"{value}{VIDEO_SUFFIX}"
    if set(value) & set("/\\:") or value.startswith(".") or not value.isprintable():
        raise RequestError(
            f"output is {quote(value)}; it must be a plain name, such as clip{VIDEO_SUFFIX}: every video lies in the "
            "folder of --out itself."
        )
    if "." in value and not value.lower().endswith(VIDEO_SUFFIX):
        raise RequestError(f"output is {quote(value)}; a video is an {VIDEO_SUFFIX}. Name it {quote(name)}.")
    if len(name.encode()) > _MAX_OUTPUT_BYTES:
        raise RequestError(f"output is {quote(value)}; a name has at most {_MAX_OUTPUT_BYTES} bytes.")
    if not is_allowed_name(name):
        raise RequestError(f"output is {quote(value)}, which this system does not allow as a name. Choose another.")
    return name


class OutputNames:
    """Gives each row a name that nothing else in the folder has.

    Args:
        folder: of the videos.
        taken: names of videos of earlier runs, whether they are there or not.
        num_rows: of the batch; decides how many digits a number has.
    """

    def __init__(self, folder: Path, taken: Iterable[str], num_rows: int) -> None:
        self._digits = max(_MIN_DIGITS, len(str(num_rows)))
        entries = (entry.name for entry in os.scandir(folder)) if folder.is_dir() else ()
        self._taken = {fold_name(name) for name in (*taken, *entries)}

    def is_free(self, name: str) -> bool:
        """Tells whether nothing has this name, nor one that some systems take for the same."""
        return fold_name(name) not in self._taken

    def take(self, row: BatchRow) -> str:
        """Returns the name of a row's video; no other row gets it.

        Raises:
            RequestError: the row gives a name that something else has.
        """
        if row.output is not None:
            if not self.is_free(row.output):
                raise RequestError(
                    f"output is {quote(row.output)}, a name that another row or file of the folder has. Choose another."
                )
            self._taken.add(fold_name(row.output))
            return row.output
        words = prompt_words(row.request.prompt)
        stem = f"{row.number:0{self._digits}}" + (f"-{words}" if words else "")
        return self.take_numbered(f"{stem}{VIDEO_SUFFIX}")

    def take_numbered(self, name: str) -> str:
        """Returns a name, or the first free one of name-2, name-3, ..."""
        stem, suffix = os.path.splitext(name)
        number, candidate = 1, name
        while not self.is_free(candidate):
            number += 1
            candidate = f"{stem}-{number}{suffix}"
        self._taken.add(fold_name(candidate))
        return candidate


def prompt_words(prompt: str) -> str:
    """Returns the first words of a prompt as part of a name: letters and digits of any script, joined by dashes."""
    text = unicodedata.normalize("NFC", prompt[: 4 * _MAX_WORDS]).lower()
    letters = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text)
    words = ""
    for word in letters.split():
        longer = f"{words}-{word}" if words else word[:_MAX_WORDS]  # a sentence of some scripts has no spaces
        if len(longer) > _MAX_WORDS or len(longer.encode()) > _MAX_WORDS_BYTES:
            break
        words = longer
    return words


def fold_name(name: str) -> str:
    """Returns what two names have in common that some system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()
