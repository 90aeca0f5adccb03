"""How what the network says with a prompt, with another and with some of its blocks disturbed becomes one velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kadr.sampling.settings import ATTENTION_VALUES, Guidance, Strengths

SMALL = 1e-8  # keeps the share of CFG-star finite


class Text(NamedTuple):
    """An encoded prompt: encoding (B, L, T) and mask (B, L), true where it is not padding."""

    encoding: Tensor
    mask: Tensor


class Disturb(NamedTuple):
    """Which rows of a batch are evaluated once more with some blocks disturbed, and how; see `Guidance`."""

    blocks: tuple[int, ...]
    mode: str
    rows: slice


class Model(Protocol):
    """tokens (B, N, C), level (B, 1 or N) and text to velocity (B, N, C), and to that of the disturbed rows if any."""

    def __call__(
        self, tokens: Tensor, level: Tensor, text: Text, disturb: Disturb | None = None
    ) -> tuple[Tensor, Tensor | None]: ...


Estimate = Callable[[int, Tensor, Tensor], Tensor]  # step, tokens (B, N, C), level (B, 1 or N) -> velocity


class Said(NamedTuple):
    """What the network said, each (B, N, C): with the prompt, with the negative one, and disturbed."""

    prompt: Tensor
    negative: Tensor | None
    disturbed: Tensor | None


def guided(
    model: Model,
    text: Text,
    negative: Text | None,
    guidance: Guidance,
    steps: Sequence[Strengths],
    *,
    together: bool = False,
) -> Estimate:
    """The guided velocity.

    Args:
        negative: needed where a step's scale is above 1.
        guidance: for what does not change from step to step.
        steps: the strengths of each.
        together: evaluate both prompts in one batch: twice the activations, fewer kernel launches, the same numbers.
    """

    # One object for all steps: a model may keep what it makes of a text.
    both = Text(*(torch.cat(pair) for pair in zip(negative, text, strict=True))) if negative and together else None

    def estimate(index: int, tokens: Tensor, level: Tensor) -> Tensor:
        strengths = steps[index]
        said = _ask(model, tokens, level, text, negative, both, strengths, guidance.mode or ATTENTION_VALUES)
        return combine(said, strengths, guidance, tokens, level)

    return estimate


def _ask(
    model: Model,
    tokens: Tensor,
    level: Tensor,
    text: Text,
    negative: Text | None,
    both: Text | None,
    strengths: Strengths,
    mode: str,
) -> Said:
    """both: the negative prompt and the prompt, where they are evaluated in one batch."""
    batch = len(tokens)
    disturb = None
    if strengths.stg > 0 and strengths.skip_blocks:
        disturb = Disturb(strengths.skip_blocks, mode, slice(None))
    if strengths.scale <= 1:
        prompt, disturbed = model(tokens, level, text, disturb)
        without = None
    elif negative is None:
        raise ValueError(f"guidance is {strengths.scale}, and there is no negative prompt")
    elif both is not None:
        disturb = disturb and disturb._replace(rows=slice(batch, None))
        said, disturbed = model(torch.cat([tokens, tokens]), torch.cat([level, level]), both, disturb)
        without, prompt = said.chunk(2)
    else:
        without, _ = model(tokens, level, negative)
        prompt, disturbed = model(tokens, level, text, disturb)
    if strengths.stg > 0 and disturbed is None:
        disturbed = prompt  # no block is disturbed
    return Said(prompt, without, disturbed)


def combine(said: Said, strengths: Strengths, guidance: Guidance, tokens: Tensor, level: Tensor) -> Tensor:
    """One velocity (B, N, C) of all that was said.

    v = n + scale · (p - n) with prompt p and negative n (Ho and Salimans 2022, arXiv:2207.12598), plus stg · (p - d)
    with the disturbed d (Hyung et al. 2024, arXiv:2411.18664). Sums and deviations run over all tokens of a sample,
    those of conditions too, as in LTXVideoPipeline of the official package.
    """
    prompt, negative, disturbed = said
    made = prompt
    if negative is not None:
        if guidance.cfg_star:
            negative = shared(prompt, negative) * negative
        if guidance.apg is not None and guidance.apg >= 0:
            made = projected(prompt, negative, strengths.scale, tokens, level, guidance)
        else:
            made = negative + strengths.scale * (prompt - negative)
    if disturbed is not None:
        made = made + strengths.stg * (prompt - disturbed)
        if strengths.rescale != 1:
            ratio = _deviation(prompt) / _deviation(made)
            made = made * (strengths.rescale * ratio + (1 - strengths.rescale))
    return made


def shared(prompt: Tensor, negative: Tensor) -> Tensor:
    """The factor (B, 1, 1) that brings `negative` nearest to `prompt` (CFG-Zero*, arXiv:2503.18886)."""
    product = (prompt * negative).flatten(1).sum(1)
    return (product / (negative.square().flatten(1).sum(1) + SMALL))[:, None, None]


def projected(
    prompt: Tensor, negative: Tensor, scale: float, tokens: Tensor, level: Tensor, guidance: Guidance
) -> Tensor:
    """Guidance whose part along the clean picture is weakened (APG, Sadat et al. 2024, arXiv:2410.02416).

    Guidance along the picture mostly raises contrast and saturation. The split is made between clean pictures, x - t v,
    per channel over all tokens; a token at level 0 is its own clean picture and is not guided.
    """
    level = level[..., None]
    picture = tokens - level * prompt
    push = level * (negative - prompt)  # from the negative's clean picture to the prompt's
    if guidance.apg_norm:
        norm = push.square().sum((1, 2), keepdim=True).sqrt()
        push = push * (guidance.apg_norm / norm.clamp(min=SMALL)).clamp(max=1)
    unit = torch.nn.functional.normalize(picture.double(), dim=1)
    along = ((push.double() * unit).sum(1, keepdim=True) * unit).to(push.dtype)
    push = push - along + (guidance.apg or 0.0) * along
    return prompt - (scale - 1) * torch.where(level > 0, push / level.clamp(min=SMALL), 0.0)


def _deviation(x: Tensor) -> Tensor:
    """(B, 1, 1), unbiased."""
    return x.flatten(1).std(1)[:, None, None]
