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

SHOWN = 80  # characters of a prompt that a warning names


class Prompts:
    """The prompts of one request.

    Args:
        texts: the prompt and, where guidance needs it, the negative prompt.
    """

    def __init__(self, components: Components, texts: Sequence[str]) -> None:
        self.components, self.texts = components, texts

    @cached_property
    def tokens(self) -> list[PromptTokens]:
        """Of each prompt. What does not fit is cut off with a warning.

        Raises:
            RequestError: a prompt holds half a character.
        """
        return [self._tokens(text) for text in self.texts]

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each prompt has."""
        return tuple(int(tokens.mask.sum()) for tokens in self.tokens)

    @cached_property
    def _rows(self) -> list[Tensor | None]:
        """What is known of each prompt: rows (n, D) for its n real tokens, on the CPU."""
        return [self.components.prompt_cache.look_up(tokens) for tokens in self.tokens]

    @property
    def missing(self) -> int:
        """How many have to be encoded."""
        return sum(rows is None for rows in self._rows)

    def encoded(self, watch: Watch) -> list[PromptEmbeddings]:
        """The encodings, (1, 256, D) each, on the device; zero where there is no token.

        Raises:
            NonFiniteError: the encoder gave NaN or infinity, in float32 too.
        """
        run = retry_on_oom(self.components, "text", partial(self._encode, watch))
        retry_in_fp32("text", self.components.stage_dtype("text"), run)
        return [self._text(*each) for each in zip(self.tokens, self._rows, strict=True)]

    def _encode(self, watch: Watch, dtype: torch.dtype | None) -> None:
        """Encode what is missing. What one prompt comes to does not depend on those beside it, nor on their failing."""
        count, watchman = len(self.texts), FiniteCheck.for_device(self.components.device)
        stage = StageProgress("text", count, watch)
        with self.components.text_encoder(dtype) if self.missing else nullcontext() as encoder:
            for index, tokens in enumerate(self.tokens):
                if self._rows[index] is None:
                    assert encoder is not None
                    rows = self._encoded(encoder, tokens, watchman, f"prompt {index + 1} of {count}")
                    self.components.prompt_cache.store(tokens, rows)
                    self._rows[index] = rows
                stage.report(index + 1)

    def _encoded(self, encoder: T5Encoder, tokens: PromptTokens, watchman: FiniteCheck, place: str) -> Tensor:
        ids, mask = tokens.ids.to(self.components.device), tokens.mask.to(self.components.device)
        rows = encoder(ids, mask)[mask]
        watchman.check(rows, place)
        rows = rows.cpu()
        watchman.synchronize()
        return rows

    def _text(self, tokens: PromptTokens, rows: Tensor | None) -> PromptEmbeddings:
        assert rows is not None
        encoding = rows.new_zeros(*tokens.ids.shape, rows.shape[1])
        encoding[tokens.mask] = rows
        device = self.components.device
        return PromptEmbeddings(encoding.to(device), tokens.mask.to(device))

    def _tokens(self, text: str) -> PromptTokens:
        tokens = self.components.tokenizer.encode(text)
        if tokens.truncated_text:
            warnings.warn(
                f"the prompt {_short(text)!r} is longer than {tokens.ids.shape[1]} tokens; cut off: "
                f"{_short(tokens.truncated_text)!r}",
                KadrWarning,
                stacklevel=2,
            )
        return tokens


def _short(text: str) -> str:
    """Its beginning and its end."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
