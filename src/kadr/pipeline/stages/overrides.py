"""Tensors and functions that a caller puts in the place of a generation's own: `kadr.diffusers` works through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kadr.sampling.guidance import Combine, PromptEmbeddings
from kadr.sampling.noise import NoiseSource
from kadr.sampling.samplers import FinishStep
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH


@dataclass(frozen=True)
class Overrides:
    """Tensors and functions that take the place of a generation's own. What is None or empty replaces nothing.

    Args:
        noise_source: draws all noise, instead of the streams of the seed.
        prompt_embeddings: of each of `ResolvedRequest.all_prompts`, (1, L, D) with masks (1, L).
        prompt_length: tokens that a prompt is truncated and padded to.
        attends_padding: the text encoder attends to padding too; see `PromptEncoder`.
        pixels: path of an image or clip of the resolved request -> float32 (1, 3, 8k+1, H, W) in [-1, 1], at the size
            that is encoded. Such a path is a name, and no file is opened.
        draw_media_noise: (path, shape) -> noise with which the latents of an image or clip are sampled; None takes
            their mean.
        causal_positions: latent frame l is at its own first pixel frame, instead of what the model was trained with.
        combine_predictions: guidance, instead of `sampling.guidance.combine`.
        finish_step: changes the state after each step of a sampler, or raises `StopSampling`.
    """

    noise_source: NoiseSource | None = None
    prompt_embeddings: Sequence[PromptEmbeddings] = ()
    prompt_length: int = MAX_SEQUENCE_LENGTH
    attends_padding: bool = False
    pixels: Mapping[str, Tensor] = field(default_factory=dict)
    draw_media_noise: Callable[[str, torch.Size], Tensor] | None = None
    causal_positions: bool | None = None
    combine_predictions: Combine | None = None
    finish_step: FinishStep | None = None


NO_OVERRIDES = Overrides()
