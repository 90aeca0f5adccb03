"""What a chat endpoint answers, read with mistrust: JSON to the answer's text, and that to one paragraph."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

MAX_WORDS = 190  # at about 1.3 tokens per English word, what goes into the 256 tokens of the text encoder
MIN_WORDS = 4  # fewer are an "OK.", not a description
MAX_WORD_LENGTH = 60  # letters: what is longer is data, or noise
MAX_QUOTE_LENGTH = 200  # characters of somebody else's message that are passed on
LATIN_END = 0x250  # letters below are of alphabets that the text encoder reads

_NAMES = "think|thinking|thought|reasoning"
_REASONING = re.compile(rf"<({_NAMES})>.*?(</\1>|\Z)|\[({_NAMES})\].*?(\[/\3\]|\Z)", re.DOTALL | re.IGNORECASE)
_REASONING_END = re.compile(rf"\A.*(</({_NAMES})>|\[/({_NAMES})\])", re.DOTALL | re.IGNORECASE)
# gpt-oss marks what it thinks and what it says as channels, which some servers pass on.
_CHANNEL = re.compile(r"\A.*<\|channel\|>\s*final\s*(<\|constrain\|>\w+\s*)?<\|message\|>", re.DOTALL)
_CHANNEL_END = re.compile(r"<\|(end|return)\|>.*\Z", re.DOTALL)
_FENCE = re.compile(r"^[^\S\n]*(```|~~~).*$", re.MULTILINE)
_MARKS = re.compile(r"^[^\S\n]*(#{1,6}|>|[-*•])[^\S\n]+", re.MULTILINE)  # of headings, quotations and lists
_STARS = re.compile(r"\*\*")
# "Here is your prompt:", alone or before the paragraph; and a bare label. A paragraph may begin with such words itself,
# so they count at the end of a line, or where they speak of a text.
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
    """An answer that is none. Its message goes on from the name of the endpoint: "answered with HTML, not JSON"."""


Redact = Callable[[str], str]  # takes out what is nobody's business


def completion_text(body: bytes, redact: Redact = str) -> str:
    """The text that a chat completion holds.

    Raises:
        Unusable: it is no chat completion, holds no text, or says that it was refused or cut off.
    """
    try:
        data = json.loads(body)
    except ValueError:
        raise UnusableAnswer(f"answered with {_describe_body(body)}, not JSON") from None
    except RecursionError:
        raise UnusableAnswer("answered with JSON of too many levels") from None
    if isinstance(data, dict) and data.get("error"):
        raise UnusableAnswer(f"answered with an error: {error_message(body, redact) or 'it does not say which'}")
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnusableAnswer("answered without choices, so it is no chat endpoint or not a whole answer")
    said = choices[0].get("message")
    said = said if isinstance(said, dict) else {}
    if said.get("refusal"):
        raise UnusableAnswer(f"declined: {sanitize(str(said['refusal']), redact)}")
    if choices[0].get("finish_reason") == "content_filter":
        raise UnusableAnswer("let its filter hold the answer back")
    if choices[0].get("finish_reason") == "length":
        raise UnusableAnswer("cut its answer off at its limit of tokens; raise that, or take a model that thinks less")
    return _join_content(said.get("content"), redact)


def extract_paragraph(answer: str, redact: Redact = str) -> str:
    """The one paragraph of an answer, without what chat models put around it.

    Raises:
        Unusable: nothing is left, or what is left is no description.
    """
    text = _CHANNEL_END.sub("", _CHANNEL.sub("", answer))
    text = _REASONING_END.sub("", _REASONING.sub("", text))
    if answer.strip() and not text.strip():
        raise UnusableAnswer("answered with thoughts alone")
    text = _STARS.sub("", _MARKS.sub("", _FENCE.sub("", text)))
    text = _strip_closing_remark(_OPENING.sub("", _strip_quotes(text)))
    text = redact(_strip_quotes(_strip_control_characters(text.replace("|", " "))))
    if not text:
        raise UnusableAnswer("answered with nothing")
    if text[0] in "{[<":
        raise UnusableAnswer(f"answered with data instead of a description: {_ellipsize(text)}")
    if _REFUSAL.match(text):
        raise UnusableAnswer(f"declined: {_ellipsize(text)}")
    letters = [sign for sign in text if sign.isalpha()]
    if sum(ord(sign) < LATIN_END for sign in letters) < len(letters) / 2:
        raise UnusableAnswer(f"answered in letters that the text encoder does not read: {_ellipsize(text)}")
    if len(text.split()) < MIN_WORDS or max(map(len, text.split())) > MAX_WORD_LENGTH:
        raise UnusableAnswer(f"answered with no description, but with {_ellipsize(text)!r}")
    return text


def truncate_to_sentences(text: str) -> str:
    """The whole sentences at the beginning of a text that the text encoder has room for; all of a text that fits.

    Raises:
        Unusable: its first sentence alone is too long.
    """
    found = list(re.finditer(r"\S+", text))
    if len(found) <= MAX_WORDS:
        return text
    room = text[: found[MAX_WORDS - 1].end()]
    ends = [end.end() for end in _SENTENCE_END.finditer(room)]
    if not ends:
        raise UnusableAnswer(
            f"answered with {len(found)} words without an end of a sentence among the first {MAX_WORDS}"
        )
    return room[: ends[-1]]


def split_words(text: str) -> list[str]:
    """The words of a text, without punctuation and capitals: what is the same in two ways to write it."""
    return re.findall(r"\w+", text.lower())


def error_message(body: bytes, redact: Redact = str) -> str:
    """What a server says of an error, in one short line; "" where it says nothing readable."""
    text = body.decode("utf-8", "replace")
    try:
        return sanitize(_find_error_message(json.loads(text)), redact)
    except (ValueError, RecursionError):
        return "" if "<" in text[:200] else sanitize(text, redact)


def sanitize(text: str, redact: Redact = str) -> str:
    """Somebody else's words for a message of ours: one line, short, nothing that would steer a terminal."""
    return _ellipsize(redact(_strip_control_characters(text)).rstrip("."))


def _find_error_message(data: Any) -> str:
    """The message in an answer about an error, in any of the forms that are about."""
    while isinstance(data, dict):
        data = next((data[name] for name in ("error", "message", "detail", "msg") if data.get(name)), "")
    return data if isinstance(data, str) else json.dumps(data)


def _join_content(content: Any, redact: Redact) -> str:
    """The content of a message: text, or parts of which some are text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = " ".join(part for part in parts if isinstance(part, str))
    if content is None or content == "":
        raise UnusableAnswer("answered with nothing")
    if not isinstance(content, str):
        raise UnusableAnswer(f"answered with content that is no text: {sanitize(json.dumps(content), redact)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableAnswer("answered with half a character") from None
    return content


def _describe_body(body: bytes) -> str:
    start = body.lstrip()[:200].lower()
    if not start:
        return "nothing"
    if start.startswith(b"data:"):
        return "a stream of events"
    return "HTML" if start.startswith(b"<") else "something else"


def _strip_closing_remark(text: str) -> str:
    """Without a last line that speaks to the user."""
    before, _, last = text.rstrip().rpartition("\n")
    return before if before.strip() and _CLOSING.match(last.lstrip()) else text


def _strip_quotes(text: str) -> str:
    """Without the quotation marks that stand around all of it; those of lettering at both ends stay."""
    text = text.strip()
    inner = text[1:-1]
    if not inner or (text[0], text[-1]) not in _QUOTES:
        return text
    begin, end = text[0], text[-1]
    first = min((place for place in (inner.find(begin), inner.find(end)) if place >= 0), default=None)
    # The first mark inside must open a quotation of its own, else it ends the one that the text begins with.
    opens = first is None or (inner[first] == begin and (begin != end or inner[first - 1 : first].isspace()))
    return inner.strip() if opens else text


def _strip_control_characters(text: str) -> str:
    spaced = " ".join(text.split())
    return "".join(sign for sign in spaced if unicodedata.category(sign) not in ("Cc", "Cs"))


def _ellipsize(text: str) -> str:
    return text if len(text) <= MAX_QUOTE_LENGTH else f"{text[:MAX_QUOTE_LENGTH]}..."
