"""The rectified-flow objective: x_t = (1 - t) x + t n, and the network predicts n - x.

Training sigmas are drawn as the official trainer draws them (ShiftedLogitNormalTimestepSampler of LTX-Video-Trainer),
uniformly, or stratified, so that a batch has one of each part of the range.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Tokens, and the mean of the normal distribution whose sigmoid the sigmas are.
MIN_TOKENS_SHIFT, MAX_TOKENS_SHIFT = (1024, 0.95), (4096, 2.05)
LOGIT_NORMAL = (1.2, 1.3)  # mean and standard deviation of the normal distribution behind stratified sigmas
QUANTILE_EPSILON = 1e-4  # distance from 0 and 1 at which quantiles are clamped: the normal's are infinite there


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns (1 - sigma) clean + sigma noise, for tokens or latents. sigma: of any shape that broadcasts."""
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Returns the velocity that the network must predict, the same at every sigma."""
    return noise - clean


def masked_mse(predicted: Tensor, target: Tensor, loss_mask: Tensor) -> Tensor:
    """Returns the loss: the mean squared error of a velocity (B, N, C).

    Args:
        loss_mask: (N), true for the tokens that count. Clean condition tokens carry no information.
    """
    return (predicted.float() - target).square()[:, loss_mask].mean()


def shifted_logit_normal(normal: Tensor, tokens: int) -> Tensor:
    """Maps standard normal numbers to sigmas: the more tokens a video has, the nearer to 1.

    More tokens show the same scene, so it takes more noise to hide as much of it.
    """
    (few, low), (many, high) = MIN_TOKENS_SHIFT, MAX_TOKENS_SHIFT
    return torch.sigmoid(normal + low + (tokens - few) * (high - low) / (many - few))


def uniform(normal: Tensor, tokens: int) -> Tensor:
    """Maps standard normal numbers to sigmas that are uniform between 0 and 1."""
    return torch.special.ndtr(normal)


SIGMA_DISTRIBUTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "shifted-logit-normal": shifted_logit_normal,
    "uniform": uniform,
}


def stratified_sigmas(count: int) -> Tensor:
    """Draws (count) sigmas from torch's global generator, one in each of `count` parts of the range.

    Half are uniform; half lean towards noise, where layout and motion are decided.
    """
    mean, deviation = LOGIT_NORMAL
    even = (torch.randperm(count) + torch.rand(count)) / count
    leaning = torch.sigmoid(mean + deviation * torch.special.ndtri(even.clamp(QUANTILE_EPSILON, 1 - QUANTILE_EPSILON)))
    return torch.where(torch.rand(count) < 0.5, even, leaning)
