"""Foreign text as messages show it: on one line, without control codes, cut to a length.

Names, metadata and prompts come from files and servers of other people. A terminal obeys the escape sequences in them,
and direction marks reorder the words around them, so every character that is not printable is shown as its escape.
"""

from __future__ import annotations

import reprlib
from typing import Any

MAX_QUOTED = 80  # characters of one value in a message
MAX_LINE = 480  # characters of a message; with "warning: " before it, a line has fewer than 500
_GAP = "..."


def escape(text: str) -> str:
    r"""Returns a text with each unprintable character as its escape, such as \x1b, \n or \u202e."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def shorten(text: str, limit: int) -> str:
    """Returns a text of at most `limit` characters; a longer one loses its middle."""
    if len(text) <= limit:
        return text
    tail = (limit - len(_GAP)) // 3
    return f"{text[: limit - len(_GAP) - tail]}{_GAP}{text[len(text) - tail :]}"


def show(text: Any, limit: int = MAX_QUOTED) -> str:
    """Returns foreign text for a message: escaped, on one line, cut in its middle to `limit` characters."""
    return shorten(escape(shorten(str(text), limit)), limit)


def quote(value: Any, limit: int = MAX_QUOTED) -> str:
    """Returns the repr of a value for a message, cut in its middle to `limit` characters, however large the value."""
    return shorten(escape(_Repr(limit).repr(value)), limit)


def one_line(message: Any, limit: int = MAX_LINE) -> str:
    """Returns a message on one line of at most `limit` characters; its line breaks become spaces.

    Long words lose their middle first, because they are values and paths: the sentence around them says what to do.
    """
    text = " ".join(str(message).splitlines())
    if len(text) > limit:
        text = " ".join(shorten(word, limit // 4) for word in shorten(text, 100 * limit).split(" "))
    return show(text, limit)


class _Repr(reprlib.Repr):
    """A repr in time and memory that the limit bounds: a few entries of each container, a few levels deep."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = self.maxlong = limit

    def repr_int(self, value: int, level: int) -> str:
        """Returns the decimal digits; of a number too long for them, as Python refuses it, the number of bits."""
        if value.bit_length() > 4 * self.maxlong:
            return f"a number of {value.bit_length()} bits"
        return repr(value)

    def repr_str(self, value: str, level: int) -> str:
        """Returns the quoted text; of a long one, its beginning and end."""
        return repr(shorten(value, self.maxstring))
