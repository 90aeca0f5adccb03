"""Checks of prompts: too few words, or another language, for a model that wants a paragraph in English.

`request.prompt_words` warns of an empty prompt and of words that a small model does not know, `pipeline.stages.text` of
a prompt that is too long where the tokenizer is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator

from kadr.diagnosis.finding import QUALITY, Finding
from kadr.quoting import quote
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH

MIN_PROMPT_WORDS = 20  # captions of the training had a paragraph; a sentence of so many says most of it
MAX_FOREIGN_SHARE = 0.3  # of the letters
_LAST_LATIN_LETTER = "\u024f"
ENHANCE_FIX = "--enhance http://localhost:11434/v1"


def check_prompts(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    """Yields the findings about prompts, one of a kind."""
    if spec.release is not None and spec.release.words:
        return  # a small vocabulary, of which every word is looked at elsewhere
    prompts = [prompt for prompt in resolved.prompts if prompt.strip()]
    if foreign := next(filter(_is_foreign, prompts), None):
        message = f"the prompt {quote(foreign)} is not in English, the only language that the model was trained with."
        yield Finding(QUALITY, "prompt", message, ENHANCE_FIX)
    elif short := next((prompt for prompt in prompts if len(prompt.split()) < MIN_PROMPT_WORDS), None):
        words = len(short.split())
        message = (
            f"the prompt has {words} word{'s' * (words != 1)}, and this model was trained with paragraphs: what "
            "happens, how everything looks, the camera and the light. Of a few words it makes a vague video with "
            "little motion."
        )
        yield Finding(QUALITY, "prompt", message, ENHANCE_FIX)
    if spec.tokenizer is None and any(len(prompt.split()) > MAX_SEQUENCE_LENGTH for prompt in prompts):
        message = (
            f"the prompt has more than {MAX_SEQUENCE_LENGTH} words, and the model reads as many tokens. Shorten it."
        )
        yield Finding(QUALITY, "prompt", message)


def _is_foreign(prompt: str) -> bool:
    letters = [letter for letter in prompt if letter.isalpha()]
    return sum(letter > _LAST_LATIN_LETTER for letter in letters) > MAX_FOREIGN_SHARE * len(letters)
