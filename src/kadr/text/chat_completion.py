"""Parses the answer of a chat endpoint, which is not trusted: JSON to text, and text to one paragraph."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

MAX_WORDS = 190  # fit into the 256 tokens of the text encoder, at about 1.3 tokens per English word
MIN_WORDS = 4  # a shorter answer is an "OK.", not a description
MAX_WORD_LENGTH = 60  # letters; a longer word is data, or noise
MAX_QUOTE_LENGTH = 200  # characters of an endpoint's message that are quoted
LATIN_END = 0x250  # letters below this code point belong to scripts that the text encoder reads

_NAMES = "think|thinking|thought|reasoning"
_REASONING = re.compile(rf"<({_NAMES})>.*?(</\1>|\Z)|\[({_NAMES})\].*?(\[/\3\]|\Z)", re.DOTALL | re.IGNORECASE)
_REASONING_END = re.compile(rf"\A.*(</({_NAMES})>|\[/({_NAMES})\])", re.DOTALL | re.IGNORECASE)
# gpt-oss marks its reasoning and its answer as channels, which some servers pass on.
_CHANNEL = re.compile(r"\A.*<\|channel\|>\s*final\s*(<\|constrain\|>\w+\s*)?<\|message\|>", re.DOTALL)
_CHANNEL_END = re.compile(r"<\|(end|return)\|>.*\Z", re.DOTALL)
_FENCE = re.compile(r"^[^\S\n]*(```|~~~).*$", re.MULTILINE)
_MARKS = re.compile(r"^[^\S\n]*(#{1,6}|>|[-*•])[^\S\n]+", re.MULTILINE)  # of headings, quotations and lists
_STARS = re.compile(r"\*\*")
# "Here is your prompt:", on its own or before the paragraph; and a bare label. A paragraph may begin with such words
# itself, so they count only at the end of a line, or if they mention a text.
_OPENING = re.compile(
    r"\A\s*((sure|certainly|of course|absolutely|okay|ok|great)\b[^\n:]{0,40}[!.,:]\s*)?"
    r"((here(['’]s| is| are)|below is)\b[^\n:]{0,120}:(?=\s*\n)|"
    r"(here(['’]s| is| are)|this is|below is)\b[^\n:.!?]{0,80}"
    r"\b(prompt|paragraph|description|caption|version|rewrite)s?\b[^\n:.!?]{0,60}:|"
    r"((enhanced|improved|rewritten|expanded|final|video|new|revised)\s+){0,3}"
    r"(prompt|paragraph|description|caption|scene \d+)( \([^)\n]{0,40}\))?\s*:)\s*",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"\(?(let me know|feel free|would you like|i hope|note\b|word count|\d+ words)", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\A((i['’]?m|i am) ((really |very |so )?(sorry|unable|not able)|(just )?an ai\b)|as an ai\b|"
    r"sorry[,.!]? (but )?i\b|"
    r"(unfortunately, )?i (can['’]?t|cannot|can not|won['’]?t|will not|must decline|don['’]?t|do not)\b)",
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("„", "“"), ("«", "»"), ("`", "`"))
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)]*(?=\s|\Z)")


class UnusableAnswer(Exception):
    """An answer that is no prompt. Its message continues the endpoint's name: "answered with HTML, not JSON"."""


Redact = Callable[[str], str]  # removes secrets from a text


def completion_text(body: bytes, redact: Redact = str) -> str:
    """Returns the text of a chat completion.

    Raises:
        UnusableAnswer: it is not a chat completion, has no text, or says that it was refused or cut off.
    """
    try:
        data = json.loads(body)
    except ValueError:
        raise UnusableAnswer(f"answered with {_describe_body(body)}, not JSON") from None
    except RecursionError:
        raise UnusableAnswer("answered with JSON nested too deeply") from None
    if isinstance(data, dict) and data.get("error"):
        raise UnusableAnswer(f"answered with an error: {error_message(body, redact) or 'no reason given'}")
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnusableAnswer("answered without choices: it is not a chat endpoint, or the answer is incomplete")
    message = choices[0].get("message")
    message = message if isinstance(message, dict) else {}
    if message.get("refusal"):
        raise UnusableAnswer(f"declined: {sanitize(str(message['refusal']), redact)}")
    if choices[0].get("finish_reason") == "content_filter":
        raise UnusableAnswer("withheld its answer: its content filter objected")
    if choices[0].get("finish_reason") == "length":
        raise UnusableAnswer("cut its answer off at its token limit; raise that, or use a model that reasons less")
    return _join_content(message.get("content"), redact)


def extract_paragraph(answer: str, redact: Redact = str) -> str:
    """Returns the one paragraph of an answer, without what chat models put around it.

    Raises:
        UnusableAnswer: nothing is left, or what is left is not a description.
    """
    text = _CHANNEL_END.sub("", _CHANNEL.sub("", answer))
    text = _REASONING_END.sub("", _REASONING.sub("", text))
    if answer.strip() and not text.strip():
        raise UnusableAnswer("answered with reasoning only")
    text = _STARS.sub("", _MARKS.sub("", _FENCE.sub("", text)))
    text = _strip_closing_remark(_OPENING.sub("", _strip_quotes(text)))
    text = redact(_strip_quotes(_strip_control_characters(text.replace("|", " "))))
    if not text:
        raise UnusableAnswer("answered with nothing")
    if text[0] in "{[<":
        raise UnusableAnswer(f"answered with data instead of a description: {_ellipsize(text)}")
    if _REFUSAL.match(text):
        raise UnusableAnswer(f"declined: {_ellipsize(text)}")
    letters = [character for character in text if character.isalpha()]
    if sum(ord(letter) < LATIN_END for letter in letters) < len(letters) / 2:
        raise UnusableAnswer(f"answered in a script that the text encoder cannot read: {_ellipsize(text)}")
    if len(text.split()) < MIN_WORDS or max(map(len, text.split())) > MAX_WORD_LENGTH:
        raise UnusableAnswer(f"gave an answer that is not a description: {_ellipsize(text)!r}")
    return text


def truncate_to_sentences(text: str) -> str:
    """Returns a text up to the last sentence that fits into the text encoder; a text that fits stays whole.

    Raises:
        UnusableAnswer: its first sentence is too long already.
    """
    words = list(re.finditer(r"\S+", text))
    if len(words) <= MAX_WORDS:
        return text
    fitting = text[: words[MAX_WORDS - 1].end()]
    ends = [match.end() for match in _SENTENCE_END.finditer(fitting)]
    if not ends:
        raise UnusableAnswer(f"answered with {len(words)} words, and no sentence ends within the first {MAX_WORDS}")
    return fitting[: ends[-1]]


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation, to compare two texts."""
    return re.findall(r"\w+", text.lower())


def error_message(body: bytes, redact: Redact = str) -> str:
    """Returns a server's message about an error, in one short line; "" if it has none that is readable."""
    text = body.decode("utf-8", "replace")
    try:
        return sanitize(_find_error_message(json.loads(text)), redact)
    except (ValueError, RecursionError):
        return "" if "<" in text[:200] else sanitize(text, redact)


def sanitize(text: str, redact: Redact = str) -> str:
    """Makes an endpoint's text safe to quote in a message: one short line, without control characters."""
    return _ellipsize(redact(_strip_control_characters(text)).rstrip("."))


def _find_error_message(data: Any) -> str:
    """Returns the message of an error response, in any of the forms that servers use."""
    while isinstance(data, dict):
        data = next((data[name] for name in ("error", "message", "detail", "msg") if data.get(name)), "")
    return data if isinstance(data, str) else json.dumps(data)


def _join_content(content: Any, redact: Redact) -> str:
    """Returns the text of a message's content: text, or parts of which some are text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = " ".join(part for part in parts if isinstance(part, str))
    if content is None or content == "":
        raise UnusableAnswer("answered with nothing")
    if not isinstance(content, str):
        raise UnusableAnswer(f"answered with content that is not text: {sanitize(json.dumps(content), redact)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableAnswer("answered with half a character") from None
    return content


def _describe_body(body: bytes) -> str:
    """Names the kind of a body that is not JSON."""
    start = body.lstrip()[:200].lower()
    if not start:
        return "nothing"
    if start.startswith(b"data:"):
        return "a stream of events"
    return "HTML" if start.startswith(b"<") else "something else"


def _strip_closing_remark(text: str) -> str:
    """Removes a last line that is addressed to the user."""
    rest, _, last_line = text.rstrip().rpartition("\n")
    return rest if rest.strip() and _CLOSING.match(last_line.lstrip()) else text


def _strip_quotes(text: str) -> str:
    """Removes quotation marks around the whole text; those of quoted words at both ends stay."""
    text = text.strip()
    inner = text[1:-1]
    if not inner or (text[0], text[-1]) not in _QUOTES:
        return text
    begin, end = text[0], text[-1]
    first = min((index for index in (inner.find(begin), inner.find(end)) if index >= 0), default=None)
    # The first mark inside must open its own quotation, else it closes the one that the text begins with.
    opens = first is None or (inner[first] == begin and (begin != end or inner[first - 1 : first].isspace()))
    return inner.strip() if opens else text


def _strip_control_characters(text: str) -> str:
    one_line = " ".join(text.split())
    return "".join(character for character in one_line if unicodedata.category(character) not in ("Cc", "Cs"))


def _ellipsize(text: str) -> str:
    return text if len(text) <= MAX_QUOTE_LENGTH else f"{text[:MAX_QUOTE_LENGTH]}..."
