"""How what the network says with a prompt, with another and with some of its blocks disturbed becomes one velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kadr.sampling.settings import ATTENTION_VALUES, Guidance, StepGuidance

EPSILON = 1e-8  # keeps the share of CFG-star finite


class PromptEmbeddings(NamedTuple):
    """An encoded prompt: encoding (B, L, T) and mask (B, L), true where it is not padding."""

    embeddings: Tensor
    mask: Tensor


class Perturbation(NamedTuple):
    """Which rows of a batch are evaluated once more with some blocks disturbed, and how; see `Guidance`."""

    blocks: tuple[int, ...]
    mode: str
    rows: slice


class VelocityModel(Protocol):
    """tokens (B, N, C), level (B, 1 or N) and text to velocity (B, N, C), and to that of the disturbed rows if any."""

    def __call__(
        self,
        tokens: Tensor,
        sigma: Tensor,
        prompt_embeddings: PromptEmbeddings,
        perturbation: Perturbation | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


Denoiser = Callable[[int, Tensor, Tensor], Tensor]  # step, tokens (B, N, C), level (B, 1 or N) -> velocity


class Predictions(NamedTuple):
    """What the network said, each (B, N, C): with the prompt, with the negative one, and disturbed."""

    cond: Tensor
    uncond: Tensor | None
    perturbed: Tensor | None


def guided_denoiser(
    model: VelocityModel,
    prompt_embeddings: PromptEmbeddings,
    negative_embeddings: PromptEmbeddings | None,
    guidance: Guidance,
    step_guidance: Sequence[StepGuidance],
    *,
    guidance_batch: bool = False,
) -> Denoiser:
    """The guided velocity.

    Args:
        negative_embeddings: needed where a step's scale is above 1.
        guidance: for what does not change from step to step.
        step_guidance: the strengths of each.
        guidance_batch: evaluate both prompts in one batch: twice the activations, fewer kernel launches, the same numbers.
    """

    # One object for all steps: a model may keep what it makes of a text.
    both = (
        PromptEmbeddings(*(torch.cat(pair) for pair in zip(negative_embeddings, prompt_embeddings, strict=True)))
        if negative_embeddings and guidance_batch
        else None
    )

    def estimate(index: int, tokens: Tensor, level: Tensor) -> Tensor:
        strengths = step_guidance[index]
        said = _evaluate(
            model,
            tokens,
            level,
            prompt_embeddings,
            negative_embeddings,
            both,
            strengths,
            guidance.stg_mode or ATTENTION_VALUES,
        )
        return combine(said, strengths, guidance, tokens, level)

    return estimate


def _evaluate(
    model: VelocityModel,
    tokens: Tensor,
    sigma: Tensor,
    prompt_embeddings: PromptEmbeddings,
    negative_embeddings: PromptEmbeddings | None,
    both_embeddings: PromptEmbeddings | None,
    step_guidance: StepGuidance,
    mode: str,
) -> Predictions:
    """both: the negative prompt and the prompt, where they are evaluated in one batch."""
    batch = len(tokens)
    disturb = None
    if step_guidance.stg_scale > 0 and step_guidance.skip_blocks:
        disturb = Perturbation(step_guidance.skip_blocks, mode, slice(None))
    if step_guidance.cfg_scale <= 1:
        prompt, disturbed = model(tokens, sigma, prompt_embeddings, disturb)
        without = None
    elif negative_embeddings is None:
        raise ValueError(f"guidance is {step_guidance.cfg_scale}, and there is no negative prompt")
    elif both_embeddings is not None:
        disturb = disturb and disturb._replace(rows=slice(batch, None))
        said, disturbed = model(torch.cat([tokens, tokens]), torch.cat([sigma, sigma]), both_embeddings, disturb)
        without, prompt = said.chunk(2)
    else:
        without, _ = model(tokens, sigma, negative_embeddings)
        prompt, disturbed = model(tokens, sigma, prompt_embeddings, disturb)
    if step_guidance.stg_scale > 0 and disturbed is None:
        disturbed = prompt  # no block is disturbed
    return Predictions(prompt, without, disturbed)


def combine(
    predictions: Predictions, step_guidance: StepGuidance, guidance: Guidance, tokens: Tensor, sigma: Tensor
) -> Tensor:
    """One velocity (B, N, C) of all that was said.

    v = n + scale · (p - n) with prompt p and negative n (Ho and Salimans 2022, arXiv:2207.12598), plus stg · (p - d)
    with the disturbed d (Hyung et al. 2024, arXiv:2411.18664). Sums and deviations run over all tokens of a sample,
    those of conditions too, as in LTXVideoPipeline of the official package.
    """
    prompt, negative, disturbed = predictions
    made = prompt
    if negative is not None:
        if guidance.cfg_star:
            negative = cfg_star_scale(prompt, negative) * negative
        if guidance.apg is not None and guidance.apg >= 0:
            made = adaptive_projected_guidance(prompt, negative, step_guidance.cfg_scale, tokens, sigma, guidance)
        else:
            made = negative + step_guidance.cfg_scale * (prompt - negative)
    if disturbed is not None:
        made = made + step_guidance.stg_scale * (prompt - disturbed)
        if step_guidance.rescale != 1:
            ratio = _std(prompt) / _std(made)
            made = made * (step_guidance.rescale * ratio + (1 - step_guidance.rescale))
    return made


def cfg_star_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """The factor (B, 1, 1) that brings `uncond` nearest to `cond` (CFG-Zero*, arXiv:2503.18886)."""
    product = (cond * uncond).flatten(1).sum(1)
    return (product / (uncond.square().flatten(1).sum(1) + EPSILON))[:, None, None]


def adaptive_projected_guidance(
    cond: Tensor, uncond: Tensor, cfg_scale: float, tokens: Tensor, sigma: Tensor, guidance: Guidance
) -> Tensor:
    """Guidance whose part along the clean picture is weakened (APG, Sadat et al. 2024, arXiv:2410.02416).

    Guidance along the picture mostly raises contrast and saturation. The split is made between clean pictures, x - t v,
    per channel over all tokens; a token at level 0 is its own clean picture and is not guided.
    """
    sigma = sigma[..., None]
    picture = tokens - sigma * cond
    push = sigma * (uncond - cond)  # from the negative's clean picture to the prompt's
    if guidance.apg_norm:
        norm = push.square().sum((1, 2), keepdim=True).sqrt()
        push = push * (guidance.apg_norm / norm.clamp(min=EPSILON)).clamp(max=1)
    unit = torch.nn.functional.normalize(picture.double(), dim=1)
    along = ((push.double() * unit).sum(1, keepdim=True) * unit).to(push.dtype)
    push = push - along + (guidance.apg or 0.0) * along
    return cond - (cfg_scale - 1) * torch.where(sigma > 0, push / sigma.clamp(min=EPSILON), 0.0)


def _std(x: Tensor) -> Tensor:
    """(B, 1, 1), unbiased."""
    return x.flatten(1).std(1)[:, None, None]
