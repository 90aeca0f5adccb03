"""Groups of tokens that have one sigma at every step, because one strength conditions them.

A transformer embeds each sigma once. To look for the distinct ones at every evaluation, the host would wait for a GPU;
which tokens share one is known before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SigmaGroups:
    """A partition of tokens.

    Args:
        tokens: (G) index of a token of each group, in a flattened (B, N).
        indices: (B, N) index of the group of each token.
    """

    tokens: Tensor
    indices: Tensor

    @classmethod
    def from_values(cls, values: Tensor) -> SigmaGroups:
        """Puts tokens of equal values (B, N) into one group. On a GPU the host waits for the values."""
        distinct, indices = values.unique(return_inverse=True)
        order = torch.arange(indices.numel(), device=values.device)
        return cls(order.new_empty(len(distinct)).scatter_(0, indices.flatten(), order), indices)

    @classmethod
    def from_mask(cls, conditioning_mask: Tensor | None, num_references: int, like: Tensor) -> SigmaGroups | None:
        """Groups tokens by their conditioning mask, with reference tokens behind them in a group of their own.

        Args:
            conditioning_mask: (B, N) in [0, 1]; None where no token is conditioned.
            like: (B, N, C), the tokens.

        Returns:
            None where all tokens have one sigma, without a token to tell which.
        """
        if conditioning_mask is None and not num_references:
            return None
        mask = like.new_zeros(like.shape[:2]) if conditioning_mask is None else conditioning_mask
        return cls.from_values(torch.cat([mask, mask.new_full((len(mask), num_references), -1.0)], dim=1))

    def distinct(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sigmas of the groups (G), and the index of each token's (B, N), from sigma (B, N).

        Off a GPU, where nothing waits, equal ones are merged and sorted.

        Args:
            sigma: of the tokens; their batch may be a multiple of the groups'.
        """
        sigmas = sigma.flatten()[self.tokens]
        indices = self.indices.repeat(len(sigma) // len(self.indices), 1)
        if sigma.is_cuda:
            return sigmas, indices
        sigmas, merged = sigmas.unique(return_inverse=True)
        return sigmas, merged[indices]
