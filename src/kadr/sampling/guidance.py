"""Combines the conditional, unconditional and STG-perturbed predictions of a network into one velocity.

Classifier-free guidance (CFG) with its variants CFG-Zero* and adaptive projected guidance (APG), and spatio-temporal
guidance (STG).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kadr.sampling.samplers import Denoiser
from kadr.sampling.settings import ATTENTION_VALUES, Guidance, StepGuidance

EPSILON = 1e-8  # keeps the factor of CFG-Zero* and the step of APG finite


class PromptEmbeddings(NamedTuple):
    """Prompt embeddings of T5 (B, L, T), and their mask (B, L), true where a token is not padding."""

    embeddings: Tensor
    mask: Tensor


class Perturbation(NamedTuple):
    """STG's perturbation of a forward pass: the blocks, the mode (see `Guidance`) and the rows of the batch."""

    blocks: tuple[int, ...]
    mode: str
    rows: slice


class VelocityModel(Protocol):
    """One model evaluation: tokens (B, N, C), sigma (B, 1 or N) and prompt embeddings to velocity (B, N, C).

    Also returns the velocity of the perturbed rows, or None without a perturbation.
    """

    def __call__(
        self,
        tokens: Tensor,
        sigma: Tensor,
        prompt_embeddings: PromptEmbeddings,
        perturbation: Perturbation | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


class Predictions(NamedTuple):
    """Velocities (B, N, C): conditional (the prompt), unconditional (the negative prompt) and perturbed (STG)."""

    cond: Tensor
    uncond: Tensor | None
    perturbed: Tensor | None


# predictions, guidance of the step and of the pass, tokens (B, N, C), sigma (B, 1 or N) -> velocity (B, N, C)
Combine = Callable[[Predictions, StepGuidance, Guidance, Tensor, Tensor], Tensor]


def guided_denoiser(
    model: VelocityModel,
    prompt_embeddings: PromptEmbeddings,
    negative_embeddings: PromptEmbeddings | None,
    guidance: Guidance,
    *,
    guidance_batch: bool = False,
    combine_predictions: Combine | None = None,
) -> Denoiser:
    """Returns a denoiser that evaluates the model as guidance needs it and gives the guided velocity.

    Args:
        negative_embeddings: needed where the CFG scale is above 1.
        guidance: an evaluation looks its lists up by its sigma.
        guidance_batch: evaluate both prompts in one batch: twice the activations, fewer kernel launches, the same
            numbers.
        combine_predictions: used instead of `combine`.
    """
    # One object for all evaluations: a model may cache what it computes from prompt embeddings.
    both_embeddings = (
        PromptEmbeddings(*(torch.cat(pair) for pair in zip(negative_embeddings, prompt_embeddings, strict=True)))
        if negative_embeddings and guidance_batch
        else None
    )

    def guided_velocity(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        step_guidance = guidance.at_sigma(sigma)
        predictions = _evaluate(
            model,
            tokens,
            token_sigmas,
            prompt_embeddings,
            negative_embeddings,
            both_embeddings,
            step_guidance,
            guidance.stg_mode or ATTENTION_VALUES,
        )
        return (combine_predictions or combine)(predictions, step_guidance, guidance, tokens, token_sigmas)

    return guided_velocity


def _evaluate(
    model: VelocityModel,
    tokens: Tensor,
    sigma: Tensor,
    prompt_embeddings: PromptEmbeddings,
    negative_embeddings: PromptEmbeddings | None,
    both_embeddings: PromptEmbeddings | None,
    step_guidance: StepGuidance,
    stg_mode: str,
) -> Predictions:
    """Runs the model evaluations at one sigma.

    Args:
        both_embeddings: the negative prompt and the prompt, if they are evaluated in one batch.
    """
    batch = len(tokens)
    perturbation = None
    if step_guidance.stg_scale > 0 and step_guidance.skip_blocks:
        perturbation = Perturbation(step_guidance.skip_blocks, stg_mode, slice(None))
    if step_guidance.cfg_scale <= 1:
        cond, perturbed = model(tokens, sigma, prompt_embeddings, perturbation)
        uncond = None
    elif negative_embeddings is None:
        raise ValueError(f"guidance is {step_guidance.cfg_scale}, and there is no negative prompt")
    elif both_embeddings is not None:
        perturbation = perturbation and perturbation._replace(rows=slice(batch, None))
        both, perturbed = model(torch.cat([tokens, tokens]), torch.cat([sigma, sigma]), both_embeddings, perturbation)
        uncond, cond = both.chunk(2)
    else:
        uncond, _ = model(tokens, sigma, negative_embeddings)
        cond, perturbed = model(tokens, sigma, prompt_embeddings, perturbation)
    if step_guidance.stg_scale > 0 and perturbed is None:
        perturbed = cond  # no block is perturbed
    return Predictions(cond, uncond, perturbed)


def combine(
    predictions: Predictions, step_guidance: StepGuidance, guidance: Guidance, tokens: Tensor, sigma: Tensor
) -> Tensor:
    """Combines predictions into one velocity (B, N, C).

    v = uncond + cfg_scale · (cond - uncond), classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), plus
    stg_scale · (cond - perturbed), spatio-temporal guidance (Hyung et al. 2024, arXiv:2411.18664). Sums and standard
    deviations run over all tokens of a sample, those of conditions too, as in LTXVideoPipeline of the official package.
    """
    cond, uncond, perturbed = predictions
    velocity = cond
    if uncond is not None:
        velocity = _guide_by_text(cond, uncond, step_guidance.cfg_scale, guidance, tokens, sigma)
    if perturbed is not None:
        velocity = velocity + step_guidance.stg_scale * (cond - perturbed)
        if step_guidance.rescale != 1:
            ratio = _std(cond) / _std(velocity)
            velocity = velocity * (step_guidance.rescale * ratio + (1 - step_guidance.rescale))
    return velocity


def _guide_by_text(
    cond: Tensor, uncond: Tensor, cfg_scale: float, guidance: Guidance, tokens: Tensor, sigma: Tensor
) -> Tensor:
    """Computes classifier-free guidance in the variant that `guidance` asks for."""
    if guidance.cfg_star:
        uncond = cfg_star_scale(cond, uncond) * uncond
    if guidance.apg is not None and guidance.apg >= 0:
        return adaptive_projected_guidance(cond, uncond, cfg_scale, tokens, sigma, guidance)
    return uncond + cfg_scale * (cond - uncond)


def cfg_star_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """Returns the factor (B, 1, 1) that brings `uncond` nearest to `cond` (CFG-Zero*, arXiv:2503.18886)."""
    product = (cond * uncond).flatten(1).sum(1)
    return (product / (uncond.square().flatten(1).sum(1) + EPSILON))[:, None, None]


def adaptive_projected_guidance(
    cond: Tensor, uncond: Tensor, cfg_scale: float, tokens: Tensor, sigma: Tensor, guidance: Guidance
) -> Tensor:
    """Returns CFG whose component parallel to the clean prediction is scaled by `guidance.apg`.

    That component mostly raises contrast and saturation. The projection is done on clean predictions, x - sigma · v,
    per channel over all tokens; a token at sigma 0 is its own clean prediction and is not guided.

    Source: APG (Sadat et al. 2024, arXiv:2410.02416).
    """
    sigma = sigma[..., None]
    clean = tokens - sigma * cond
    update = sigma * (uncond - cond)  # from the unconditional clean prediction to the conditional one
    if guidance.apg_norm:
        norm = update.square().sum((1, 2), keepdim=True).sqrt()
        update = update * (guidance.apg_norm / norm.clamp(min=EPSILON)).clamp(max=1)
    parallel = _project(update, clean)
    update = update - parallel + (guidance.apg or 0.0) * parallel
    return cond - (cfg_scale - 1) * torch.where(sigma > 0, update / sigma.clamp(min=EPSILON), 0.0)


def _project(update: Tensor, clean: Tensor) -> Tensor:
    """Returns the component of `update` (B, N, C) parallel to `clean`, per channel over all tokens."""
    precise = torch.float32 if clean.device.type == "mps" else torch.float64  # which MPS does not have
    unit = torch.nn.functional.normalize(clean.to(precise), dim=1)
    return ((update.to(precise) * unit).sum(1, keepdim=True) * unit).to(update.dtype)


def _std(x: Tensor) -> Tensor:
    """Returns the unbiased standard deviation of each sample, (B, 1, 1)."""
    return x.flatten(1).std(1)[:, None, None]
