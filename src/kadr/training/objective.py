"""What a rectified flow learns: x_t = (1 - t) x + t n, and the network says n - x.

Levels are drawn as the official trainer draws them (ShiftedLogitNormalTimestepSampler of LTX-Video-Trainer), evenly, or
spread so that a batch has one of each part of the range.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MIN_TOKENS_SHIFT, MAX_TOKENS_SHIFT = (
    (1024, 0.95),
    (4096, 2.05),
)  # tokens, and the mean of the normal that levels are the sigmoid of
LOGIT_NORMAL = (1.2, 1.3)  # mean and deviation of the normal, where levels are spread
QUANTILE_EPSILON = 1e-4  # of the range between 0 and 1, that an inverse of the normal does not reach


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What lies between: tokens or latents, with as much noise as a level says that is spread over them."""
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network is to say, at any level."""
    return noise - clean


def masked_mse(predicted: Tensor, target: Tensor, loss_mask: Tensor) -> Tensor:
    """The loss: the mean square of what a velocity (B, N, C) is off.

    Args:
        loss_mask: (N), true for the tokens that count. Those that were given tell nothing.
    """
    return (predicted.float() - target).square()[:, loss_mask].mean()


def shifted_logit_normal(normal: Tensor, tokens: int) -> Tensor:
    """Levels from standard normal numbers: the more tokens a video has, the nearer to 1.

    More tokens show the same picture, so it takes more noise to hide as much of it.
    """
    (few, low), (many, high) = MIN_TOKENS_SHIFT, MAX_TOKENS_SHIFT
    return torch.sigmoid(normal + low + (tokens - few) * (high - low) / (many - few))


def uniform(normal: Tensor, tokens: int) -> Tensor:
    """Levels from standard normal numbers: none is likelier than another."""
    return torch.special.ndtr(normal)


SIGMA_DISTRIBUTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"shifted": shifted_logit_normal, "uniform": uniform}


def stratified_sigmas(count: int) -> Tensor:
    """(count) levels, drawn from torch's generator: half even, half leaning towards noise, where layout and motion are
    decided; one in each of `count` parts of the range."""
    mean, deviation = LOGIT_NORMAL
    even = (torch.randperm(count) + torch.rand(count)) / count
    leaning = torch.sigmoid(mean + deviation * torch.special.ndtri(even.clamp(QUANTILE_EPSILON, 1 - QUANTILE_EPSILON)))
    return torch.where(torch.rand(count) < 0.5, even, leaning)
