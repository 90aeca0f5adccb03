"""The first stage: prompts to encodings, from the text encoder or, where they were encoded before, from disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.models.t5 import T5Encoder
from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.sampling.guidance import PromptEmbeddings
from kadr.text.tokenizer import PromptTokens

MAX_QUOTED_CHARACTERS = 80  # characters of a prompt that a warning names


class PromptEncoder:
    """The prompts of one request.

    Args:
        prompts: the prompt and, where guidance needs it, the negative prompt.
    """

    def __init__(self, components: Components, prompts: Sequence[str]) -> None:
        self.components, self.prompts = components, prompts

    @cached_property
    def tokens(self) -> list[PromptTokens]:
        """Of each prompt. What does not fit is cut off with a warning.

        Raises:
            RequestError: a prompt holds half a character.
        """
        return [self._tokenize(text) for text in self.prompts]

    @property
    def token_counts(self) -> tuple[int, ...]:
        """How many tokens each prompt has."""
        return tuple(int(tokens.mask.sum()) for tokens in self.tokens)

    @cached_property
    def _embeddings(self) -> list[Tensor | None]:
        """What is known of each prompt: rows (n, D) for its n real tokens, on the CPU."""
        return [self.components.prompt_cache.look_up(tokens) for tokens in self.tokens]

    @property
    def uncached_count(self) -> int:
        """How many have to be encoded."""
        return sum(rows is None for rows in self._embeddings)

    def encode(self, watch: Watch) -> list[PromptEmbeddings]:
        """The encodings, (1, 256, D) each, on the device; zero where there is no token.

        Raises:
            NonFiniteError: the encoder gave NaN or infinity, in float32 too.
        """
        run = retry_on_oom(self.components, "text", partial(self._encode_uncached, watch))
        retry_in_fp32("text", self.components.stage_dtype("text"), run)
        return [self._pad(*each) for each in zip(self.tokens, self._embeddings, strict=True)]

    def _encode_uncached(self, watch: Watch, dtype: torch.dtype | None) -> None:
        """Encode what is missing. What one prompt comes to does not depend on those beside it, nor on their failing."""
        count, watchman = len(self.prompts), FiniteCheck.for_device(self.components.device)
        stage = StageProgress("text", count, watch)
        with self.components.text_encoder(dtype) if self.uncached_count else nullcontext() as encoder:
            for index, tokens in enumerate(self.tokens):
                if self._embeddings[index] is None:
                    assert encoder is not None
                    rows = self._encode_one(encoder, tokens, watchman, f"prompt {index + 1} of {count}")
                    self.components.prompt_cache.store(tokens, rows)
                    self._embeddings[index] = rows
                stage.report(index + 1)

    def _encode_one(self, encoder: T5Encoder, tokens: PromptTokens, watchman: FiniteCheck, name: str) -> Tensor:
        ids, mask = tokens.ids.to(self.components.device), tokens.mask.to(self.components.device)
        rows = encoder(ids, mask)[mask]
        watchman.check(rows, name)
        rows = rows.cpu()
        watchman.synchronize()
        return rows

    def _pad(self, tokens: PromptTokens, embeddings: Tensor | None) -> PromptEmbeddings:
        assert embeddings is not None
        encoding = embeddings.new_zeros(*tokens.ids.shape, embeddings.shape[1])
        encoding[tokens.mask] = embeddings
        device = self.components.device
        return PromptEmbeddings(encoding.to(device), tokens.mask.to(device))

    def _tokenize(self, text: str) -> PromptTokens:
        tokens = self.components.tokenizer.encode(text)
        if tokens.truncated_text:
            warnings.warn(
                f"the prompt {_shorten(text)!r} is longer than {tokens.ids.shape[1]} tokens; cut off: "
                f"{_shorten(tokens.truncated_text)!r}",
                KadrWarning,
                stacklevel=2,
            )
        return tokens


def _shorten(text: str) -> str:
    """Its beginning and its end."""
    return (
        text
        if len(text) <= MAX_QUOTED_CHARACTERS
        else f"{text[: MAX_QUOTED_CHARACTERS // 2]} ... {text[-MAX_QUOTED_CHARACTERS // 2 :]}"
    )
