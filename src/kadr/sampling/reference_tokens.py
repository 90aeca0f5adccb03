"""What a network sees beside the video: the reference of an in-context LoRA.

Its tokens are clean, at level 0, and stand in the same places and at the same times as the video's. They are no part of
the state: no step moves them, no noise meets them, and guidance sums over the video's tokens alone. So with a reference
the same seed gives the same noise as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kadr.sampling.positions import token_positions
from kadr.sampling.state import to_tokens
from kadr.shapes import LatentGrid


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens behind those that are sampled.

    Args:
        tokens: (B, M, C), or (1, M, C) for every sample of a batch.
        positions: (3, M) fp32: seconds, pixels down, pixels right.
    """

    tokens: Tensor
    positions: Tensor

    @classmethod
    def from_latents(
        cls, latents: Sequence[Tensor], *, fps: float, causal: bool, downscale: int = 1
    ) -> ReferenceTokens:
        """Of reference videos, each encoded as latents (B, C, f, h, w).

        Args:
            fps, causal: of the video; see `positions`.
            downscale: how many times smaller than the video's the sides of the references are.
        """
        stretch = torch.tensor([1.0, downscale, downscale])[:, None]
        grids = [LatentGrid(*one.shape[2:]) for one in latents]
        where = [stretch * token_positions(grid, fps=fps, causal=causal) for grid in grids]
        return cls(torch.cat([to_tokens(one) for one in latents], dim=1), torch.cat(where, dim=1))

    def append_to(self, tokens: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) and levels (B, 1 or N), with those of the context behind them: (B, N+M, C), (B, N+M)."""
        batch, count, _ = tokens.shape
        own = self.tokens.to(tokens).expand(batch, -1, -1)
        sigma = sigma.expand(batch, count)
        return torch.cat([tokens, own], dim=1), torch.cat([sigma, sigma.new_zeros(own.shape[:2])], dim=1)
