"""Reference tokens of an in-context LoRA (IC-LoRA): clean tokens that the transformer sees beside the video's.

They are at sigma 0 and share the video's positions in space and time. They are not part of the state: no step moves
them, no noise is added to them, and guidance sums over the video's tokens only. So the same seed gives the same noise
with and without a reference.
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
    """Clean tokens behind the tokens that are sampled.

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
        """Makes the tokens of reference videos, each encoded as latents (B, C, f, h, w).

        Args:
            fps, causal: of the video; see `token_positions`.
            downscale: how many times smaller than the video's the sides of the references are.
        """
        scale = torch.tensor([1.0, downscale, downscale])[:, None]
        grids = [LatentGrid(*reference.shape[2:]) for reference in latents]
        positions = [scale * token_positions(grid, fps=fps, causal=causal) for grid in grids]
        return cls(torch.cat([to_tokens(reference) for reference in latents], dim=1), torch.cat(positions, dim=1))

    def append_to(self, tokens: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Appends these to tokens (B, N, C), and zeros to sigma (B, 1 or N): (B, N+M, C), (B, N+M)."""
        batch, count, _ = tokens.shape
        reference = self.tokens.to(tokens).expand(batch, -1, -1)
        sigma = sigma.expand(batch, count)
        return torch.cat([tokens, reference], dim=1), torch.cat([sigma, sigma.new_zeros(reference.shape[:2])], dim=1)
