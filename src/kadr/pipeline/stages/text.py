"""Text stage: prompts to prompt embeddings, by the text encoder or from the prompt cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from kadr.errors import CheckpointError, KadrWarning
from kadr.models.t5 import T5Encoder
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.modules import Modules
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.quoting import quote
from kadr.sampling.guidance import PromptEmbeddings
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH, PromptTokens, Tokenizer


class PromptEncoder:
    """Encoder of the prompts of one request.

    Args:
        tokenizer: None where the text encoder is not on disk; prompts cannot be encoded then.
        prompts: the prompts and, if CFG needs it, the negative prompt.
        length: tokens that each is truncated and padded to.
        attends_padding: the text encoder attends to padding too, as in two pipelines of diffusers. Masked, as it is
            everywhere else, padding changes nothing.
        embeddings: of each prompt, instead of the text encoder's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_cache: PromptCache,
        prompts: Sequence[str],
        *,
        length: int = MAX_SEQUENCE_LENGTH,
        attends_padding: bool = False,
        embeddings: Sequence[PromptEmbeddings] = (),
    ) -> None:
        self.tokenizer, self.prompt_cache, self.prompts = tokenizer, prompt_cache, prompts
        self._length, self._attends_padding, self._given_embeddings = length, attends_padding, embeddings

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
        if self._given_embeddings:
            return tuple(int(item.mask.sum()) for item in self._given_embeddings)
        return tuple(int(tokens.mask.sum()) for tokens in self.tokens)

    @cached_property
    def _embeddings(self) -> list[Tensor | None]:
        """Embeddings (n, D) of each prompt's n real tokens, on the CPU; None for a prompt not yet encoded."""
        return [self.prompt_cache.look_up(self._attended(tokens)) for tokens in self.tokens]

    def _attended(self, tokens: PromptTokens) -> PromptTokens:
        """Returns the tokens with the mask of what the text encoder attends to, and embeds."""
        return tokens._replace(mask=torch.ones_like(tokens.mask)) if self._attends_padding else tokens

    @property
    def uncached_token_counts(self) -> tuple[int, ...]:
        """Number of tokens of each prompt that the text encoder must encode."""
        if self._given_embeddings:
            return ()
        pairs = zip(self.token_counts, self._embeddings, strict=True)
        return tuple(count for count, embeddings in pairs if embeddings is None)

    def encode(self, modules: Modules, watch: Watch) -> list[PromptEmbeddings]:
        """Returns the prompt embeddings, (1, 256, D) each, on the device; zero at tokens that were not attended to.

        Raises:
            NonFiniteError: the text encoder produced NaN or infinity, in float32 too.
        """
        if self._given_embeddings:
            return [PromptEmbeddings(*(item.to(modules.device) for item in pair)) for pair in self._given_embeddings]
        if self.uncached_token_counts:
            encode = retry_on_oom(modules, "text", partial(self._encode_uncached, modules, watch))
            retry_in_fp32(modules, "text", encode)
        else:
            progress = StageProgress("text", len(self.prompts), watch)
            for number in range(1, len(self.prompts) + 1):
                progress.report(number)
        embeddings = (item for item in self._embeddings if item is not None)
        return [
            _pad(self._attended(tokens), rows, modules.device)._replace(mask=tokens.mask.to(modules.device))
            for tokens, rows in zip(self.tokens, embeddings, strict=True)
        ]

    def _encode_uncached(self, modules: Modules, watch: Watch, dtype: torch.dtype | None) -> None:
        """Encodes the uncached prompts, one by one, so no prompt depends on another or on its failure."""
        count, finite_check = len(self.prompts), FiniteCheck.for_device(modules.device)
        progress = StageProgress("text", count, watch)
        with modules.text_encoder(dtype) as encoder:
            for index, tokens in enumerate(map(self._attended, self.tokens)):
                if self._embeddings[index] is None:
                    embeddings = _encode_prompt(encoder, tokens, modules, finite_check, f"{index + 1} of {count}")
                    self.prompt_cache.store(tokens, embeddings)
                    self._embeddings[index] = embeddings
                progress.report(index + 1)

    def _tokenize(self, text: str) -> PromptTokens:
        if self.tokenizer is None:
            raise CheckpointError("the tokenizer is not on disk. Fetch the text encoder first.")
        tokens = self.tokenizer.encode(text, self._length)
        if tokens.truncated_text:
            message = (
                f"the prompt {quote(text)} is longer than {tokens.ids.shape[1]} tokens; truncated: "
                f"{quote(tokens.truncated_text)}"
            )
            warnings.warn(KadrWarning(message, topic="prompt"), stacklevel=2)
        return tokens


def _encode_prompt(
    encoder: T5Encoder, tokens: PromptTokens, modules: Modules, finite_check: FiniteCheck, number: str
) -> Tensor:
    """Returns the embeddings (n, D) of a prompt's n real tokens, on the CPU."""
    ids, mask = tokens.ids.to(modules.device), tokens.mask.to(modules.device)
    embeddings = encoder(ids, mask)[mask]
    finite_check.check(embeddings, f"prompt {number}")
    embeddings = embeddings.cpu()
    finite_check.synchronize()
    return embeddings


def _pad(tokens: PromptTokens, embeddings: Tensor, device: torch.device) -> PromptEmbeddings:
    padded = embeddings.new_zeros(*tokens.ids.shape, embeddings.shape[1])
    padded[tokens.mask] = embeddings
    return PromptEmbeddings(padded.to(device), tokens.mask.to(device))
