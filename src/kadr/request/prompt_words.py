"""Prompts as a model reads them: their tokens, and words that a model of few words was not trained with."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from kadr.errors import KadrWarning
from kadr.models.registry import Release
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH

MAX_LISTED_WORDS = 8  # that a warning names
MAX_WORD_CHARACTERS = 30  # of each of them
WHOLE_LANGUAGE_MODEL = "ltxv-2b-0.9.8-distilled"  # the smallest release that was trained with all words, in few steps
_WORD = re.compile(r"[\w'-]+")


@dataclass(frozen=True)
class PromptFacts:
    """A prompt as a model reads it.

    Args:
        text: without space around it.
        tokens: of the whole text, with the end of the sequence; None where the tokenizer is not on disk.
        max_tokens: that the model reads.
        num_characters_read: code points of the text before the first word that is cut; None with `tokens`.
        unknown_words: those that a model of few words was not trained with, each once.
    """

    text: str
    tokens: int | None
    max_tokens: int
    num_characters_read: int | None
    unknown_words: tuple[str, ...]


def describe_prompts(resolved: ResolvedRequest, spec: ModelSpec) -> tuple[PromptFacts, ...]:
    """Returns the facts of each of `ResolvedRequest.prompts`. Reads the tokenizer, once for a spec, and no weight.

    Raises:
        RequestError: a prompt contains half a character.
        CheckpointError: the tokenizer is damaged.
    """
    return tuple(_describe_prompt(prompt.strip(), spec) for prompt in resolved.prompts)


def _describe_prompt(text: str, spec: ModelSpec) -> PromptFacts:
    release = _release_of_few_words(spec)
    words = [] if release is None else unknown_words(text, release)
    tokens = None if spec.tokenizer is None else spec.tokenizer.encode(text)
    return PromptFacts(
        text=text,
        tokens=None if tokens is None else tokens.num_tokens,
        max_tokens=MAX_SEQUENCE_LENGTH,
        num_characters_read=None if tokens is None else len(text) - len(tokens.truncated_text),
        unknown_words=tuple(dict.fromkeys(words)),
    )


def _release_of_few_words(spec: ModelSpec) -> Release | None:
    """Returns the release of a model that was trained with few words; None with LoRAs, which may know others."""
    return spec.release if spec.release is not None and spec.release.words and not spec.loras else None


def warn_of_prompts(resolved: ResolvedRequest, spec: ModelSpec) -> None:
    """Warns of an empty prompt, and of words that the model was not trained with."""
    if not all(prompt.strip() for prompt in resolved.prompts):
        warnings.warn(KadrWarning("the prompt is empty: the model decides what to show.", topic="prompt"), stacklevel=3)
    if (release := _release_of_few_words(spec)) is None:
        return
    prompts = dict.fromkeys(resolved.all_prompts)
    if words := list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt, release))):
        listed = ", ".join(repr(_shorten(word)) for word in words[:MAX_LISTED_WORDS])
        more = f" and {len(words) - MAX_LISTED_WORDS} more" if len(words) > MAX_LISTED_WORDS else ""
        message = (
            f"{release.name} was not trained with {listed}{more}, so the video need not show it; its words: `kadr "
            f"models info {release.name}`"
        )
        warnings.warn(KadrWarning(message, topic="prompt", fix=f"--model {WHOLE_LANGUAGE_MODEL}"), stacklevel=3)


def unknown_words(prompt: str, release: Release) -> list[str]:
    """Returns the words of a prompt that the model was not trained with. Captions have capitals at the start only."""
    known, words = release.known_words, _WORD.findall(prompt)
    return [word for index, word in enumerate(words) if (word if index else word[:1].lower() + word[1:]) not in known]


def _shorten(word: str) -> str:
    return word if len(word) <= MAX_WORD_CHARACTERS else f"{word[:MAX_WORD_CHARACTERS]}..."
