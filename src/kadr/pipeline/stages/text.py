"""Text stage: prompts to prompt embeddings, by the text encoder or from the prompt cache."""

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

MAX_QUOTED_CHARACTERS = 80  # characters of a prompt that a warning quotes


class PromptEncoder:
    """Encoder of the prompts of one request.

    Args:
        prompts: the prompts and, if CFG needs it, the negative prompt.
    """

    def __init__(self, components: Components, prompts: Sequence[str]) -> None:
        self.components, self.prompts = components, prompts

    @cached_property
    def tokens(self) -> list[PromptTokens]:
        """Tokens of each prompt. A prompt that is too long is truncated with a warning.

        Raises:
            RequestError: a prompt contains half a character (a lone surrogate).
        """
        return [self._tokenize(text) for text in self.prompts]

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Number of tokens of each prompt."""
        return tuple(int(tokens.mask.sum()) for tokens in self.tokens)

    @cached_property
    def _embeddings(self) -> list[Tensor | None]:
        """Embeddings (n, D) of each prompt's n real tokens, on the CPU; None for a prompt not yet encoded."""
        return [self.components.prompt_cache.look_up(tokens) for tokens in self.tokens]

    @property
    def uncached_count(self) -> int:
        """Number of prompts that the text encoder must encode."""
        return sum(embeddings is None for embeddings in self._embeddings)

    def encode(self, watch: Watch) -> list[PromptEmbeddings]:
        """Returns the prompt embeddings, (1, 256, D) each, on the device; zero at padding tokens.

        Raises:
            NonFiniteError: the text encoder produced NaN or infinity, in float32 too.
        """
        encode = retry_on_oom(self.components, "text", partial(self._encode_uncached, watch))
        retry_in_fp32("text", self.components.stage_dtype("text"), encode)
        return [self._pad(tokens, embeddings) for tokens, embeddings in zip(self.tokens, self._embeddings, strict=True)]

    def _encode_uncached(self, watch: Watch, dtype: torch.dtype | None) -> None:
        """Encodes the uncached prompts, one by one, so no prompt depends on another or on its failure."""
        count, finite_check = len(self.prompts), FiniteCheck.for_device(self.components.device)
        progress = StageProgress("text", count, watch)
        with self.components.text_encoder(dtype) if self.uncached_count else nullcontext() as encoder:
            for index, tokens in enumerate(self.tokens):
                if self._embeddings[index] is None:
                    assert encoder is not None
                    embeddings = self._encode_prompt(encoder, tokens, finite_check, f"prompt {index + 1} of {count}")
                    self.components.prompt_cache.store(tokens, embeddings)
                    self._embeddings[index] = embeddings
                progress.report(index + 1)

    def _encode_prompt(self, encoder: T5Encoder, tokens: PromptTokens, finite_check: FiniteCheck, name: str) -> Tensor:
        ids, mask = tokens.ids.to(self.components.device), tokens.mask.to(self.components.device)
        embeddings = encoder(ids, mask)[mask]
        finite_check.check(embeddings, name)
        embeddings = embeddings.cpu()
        finite_check.synchronize()
        return embeddings

    def _pad(self, tokens: PromptTokens, embeddings: Tensor | None) -> PromptEmbeddings:
        assert embeddings is not None
        padded = embeddings.new_zeros(*tokens.ids.shape, embeddings.shape[1])
        padded[tokens.mask] = embeddings
        device = self.components.device
        return PromptEmbeddings(padded.to(device), tokens.mask.to(device))

    def _tokenize(self, text: str) -> PromptTokens:
        tokens = self.components.tokenizer.encode(text)
        if tokens.truncated_text:
            warnings.warn(
                f"the prompt {_shorten(text)!r} is longer than {tokens.ids.shape[1]} tokens; truncated: "
                f"{_shorten(tokens.truncated_text)!r}",
                KadrWarning,
                stacklevel=2,
            )
        return tokens


def _shorten(text: str) -> str:
    """Returns a text's start and end, if it is longer than `MAX_QUOTED_CHARACTERS`."""
    return (
        text
        if len(text) <= MAX_QUOTED_CHARACTERS
        else f"{text[: MAX_QUOTED_CHARACTERS // 2]} ... {text[-MAX_QUOTED_CHARACTERS // 2 :]}"
    )
