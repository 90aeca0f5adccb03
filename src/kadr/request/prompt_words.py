"""Warnings about prompts: an empty one, and words that a model of few words was not trained with."""

from __future__ import annotations

import re
import warnings

from kadr.errors import KadrWarning
from kadr.models.registry import Release
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec

MAX_LISTED_WORDS = 8  # that a warning names
MAX_WORD_CHARACTERS = 30  # of each of them
WHOLE_LANGUAGE_MODEL = "ltxv-2b-0.9.8-distilled"  # the smallest release that was trained with all words, in few steps
_WORD = re.compile(r"[\w'-]+")


def warn_of_prompts(resolved: ResolvedRequest, spec: ModelSpec) -> None:
    """Warns of an empty prompt, and of words that the model was not trained with.

    A LoRA may know words of its own: with one, words are not looked at.
    """
    if not all(prompt.strip() for prompt in resolved.prompts):
        warnings.warn(KadrWarning("the prompt is empty: the model decides what to show.", topic="prompt"), stacklevel=3)
    if spec.release is None or not spec.release.words or spec.loras:
        return
    prompts = dict.fromkeys(resolved.all_prompts)
    if words := list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt, spec.release))):
        listed = ", ".join(repr(_shorten(word)) for word in words[:MAX_LISTED_WORDS])
        more = f" and {len(words) - MAX_LISTED_WORDS} more" if len(words) > MAX_LISTED_WORDS else ""
        message = (
            f"{spec.release.name} was not trained with {listed}{more}, so the video need not show it; its words: `kadr "
            f"models info {spec.release.name}`"
        )
        warnings.warn(KadrWarning(message, topic="prompt", fix=f"--model {WHOLE_LANGUAGE_MODEL}"), stacklevel=3)


def unknown_words(prompt: str, release: Release) -> list[str]:
    """Returns the words of a prompt that the model was not trained with. Captions have capitals at the start only."""
    known, words = release.known_words, _WORD.findall(prompt)
    return [word for index, word in enumerate(words) if (word if index else word[:1].lower() + word[1:]) not in known]


def _shorten(word: str) -> str:
    return word if len(word) <= MAX_WORD_CHARACTERS else f"{word[:MAX_WORD_CHARACTERS]}..."
