"""`encode_prompt` of the pipelines that read prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kadr.diffusers.base import LTXBasePipeline
from kadr.diffusers.calls.prompts import parse_prompts
from kadr.diffusers.lora import refuse_options
from kadr.pipeline.stages.overrides import Overrides
from kadr.request.request import Request
from kadr.sampling.guidance import PromptEmbeddings


class TextPipeline(LTXBasePipeline):
    """A pipeline that reads prompts."""

    _attends_padding, _default_length = False, 256

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns prompt embeddings (B, L, D) and their mask (B, L), and those of the negative prompts or None.

        Raises:
            RequestError: as the call; or an option that kadr does not take.
        """
        options.pop("device", None)
        refuse_options("encode_prompt", options)
        length = max_sequence_length or self._default_length
        prompts = parse_prompts(prompt, negative_prompt, num_videos_per_prompt, None, None, None, None, length)
        texts = prompts.texts + prompts.negative_texts * bool(do_classifier_free_guidance)
        overrides = Overrides(prompt_length=length, attends_padding=self._attends_padding)
        request = Request(texts[0], multi_scale=False)
        with self.engine.start(request, stages=("text",), prompts=texts, overrides=overrides) as generation:
            encoded = generation.prompt_encoder.encode(generation.modules, generation.watch)
        count = len(prompts.texts)
        cond = _stack(encoded[:count], num_videos_per_prompt)
        uncond = _stack(encoded[count:], num_videos_per_prompt) if do_classifier_free_guidance else (None, None)
        return (*cond, *uncond)


def _stack(items: list[PromptEmbeddings], repeats: int) -> tuple[Tensor, Tensor]:
    embeddings, mask = (torch.cat([item[part] for item in items]) for part in (0, 1))
    return embeddings.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
