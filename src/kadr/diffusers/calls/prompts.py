"""Prompts of a call: texts, or embeddings that a script gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.sampling.guidance import PromptEmbeddings
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH
from kadr.validation import check_range

MAX_VIDEOS = 1000


@dataclass(frozen=True)
class Prompts:
    """Prompts of a call, each for `videos_per_prompt` videos.

    Args:
        texts, negative_texts: one for each prompt; empty texts where embeddings are given.
        embeddings, negative_embeddings: one for each prompt; () where texts are given.
        max_length: tokens that a text is truncated and padded to.
    """

    texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    embeddings: tuple[PromptEmbeddings, ...]
    negative_embeddings: tuple[PromptEmbeddings, ...]
    videos_per_prompt: int
    max_length: int

    @property
    def num_videos(self) -> int:
        """Number of videos of the call."""
        return len(self.texts) * self.videos_per_prompt

    def texts_of(self, index: int) -> tuple[str, str]:
        """Returns the prompt and the negative prompt of a video."""
        prompt = index // self.videos_per_prompt
        return self.texts[prompt], self.negative_texts[prompt]

    def embeddings_of(self, index: int, uses_cfg: bool) -> tuple[PromptEmbeddings, ...]:
        """Returns the embeddings of a video's prompt and, with CFG, its negative prompt; () where texts are given.

        Raises:
            RequestError: CFG needs negative embeddings, and only those of the prompt are given.
        """
        if not self.embeddings:
            return ()
        prompt = index // self.videos_per_prompt
        if uses_cfg and not self.negative_embeddings:
            raise RequestError(
                "prompt_embeds are given without negative_prompt_embeds, and guidance_scale is above 1. Give them, or "
                "guidance_scale=1."
            )
        return (self.embeddings[prompt], *(self.negative_embeddings[prompt : prompt + 1] if uses_cfg else ()))


def parse_prompts(
    prompt: Any,
    negative_prompt: Any,
    videos_per_prompt: Any,
    prompt_embeds: Any,
    prompt_attention_mask: Any,
    negative_prompt_embeds: Any,
    negative_prompt_attention_mask: Any,
    max_sequence_length: Any,
) -> Prompts:
    """Returns the prompts of a call from its arguments.

    Raises:
        RequestError: neither or both of texts and embeddings are given, their numbers differ, or a mask is missing.
    """
    count = 1 if videos_per_prompt is None else videos_per_prompt
    check_range("num_videos_per_prompt", count, 1, MAX_VIDEOS, is_whole=True)
    check_range("max_sequence_length", max_sequence_length, 1, MAX_SEQUENCE_LENGTH, is_whole=True)
    if (prompt is None) == (prompt_embeds is None):
        raise RequestError("give a prompt or prompt_embeds, and not both.")
    if prompt is None:
        embeddings = _embeddings("prompt", prompt_embeds, prompt_attention_mask)
        negative = _embeddings("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask)
        if negative and len(negative) != len(embeddings):
            raise RequestError(f"{len(negative)} negative_prompt_embeds are given for {len(embeddings)} prompt_embeds.")
        empty = ("",) * len(embeddings)
        return Prompts(empty, empty, embeddings, negative, count, max_sequence_length)
    if negative_prompt_embeds is not None:
        raise RequestError("negative_prompt_embeds are given with a prompt in words; give prompt_embeds too.")
    texts = _texts("prompt", prompt)
    negative_texts = _texts("negative_prompt", negative_prompt or "")
    if len(negative_texts) == 1:
        negative_texts = negative_texts * len(texts)
    if len(negative_texts) != len(texts):
        raise RequestError(
            f"{len(negative_texts)} negative prompts are given for {len(texts)} prompts; give one for each."
        )
    return Prompts(texts, negative_texts, (), (), count, max_sequence_length)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name} is {quote(value)}; it must be text, or a list of texts.")
    return texts


def _embeddings(name: str, embeds: Any, mask: Any) -> tuple[PromptEmbeddings, ...]:
    if embeds is None:
        return ()
    if mask is None:
        raise RequestError(f"{name}_embeds are given without {name}_attention_mask; give what encode_prompt returned.")
    if (
        not isinstance(embeds, Tensor)
        or embeds.ndim != 3
        or not isinstance(mask, Tensor)
        or mask.shape != embeds.shape[:2]
    ):
        raise RequestError(f"{name}_embeds must be a tensor (B, L, D), and {name}_attention_mask one (B, L).")
    return tuple(PromptEmbeddings(embeds[i : i + 1], mask[i : i + 1].bool()) for i in range(len(embeds)))
