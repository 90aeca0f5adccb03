"""The one object a sampling works on, replaced at every step and never changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kadr.shapes import LatentGrid

SIGMA_TOLERANCE = 1e-6  # two levels nearer than this are the same


def to_tokens(latents: Tensor) -> Tensor:
    """(B, C, f, h, w) -> (B, N, C): frame by frame, row by row, column by column."""
    return latents.flatten(2).transpose(1, 2)


def to_latents(tokens: Tensor, grid: LatentGrid) -> Tensor:
    """(B, N, C) -> (B, C, f, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (grid.frames, grid.height, grid.width))


@dataclass(frozen=True)
class LatentState:
    """Tokens on their way from noise to picture.

    Args:
        tokens: (B, N, C) fp32, as they are now.
        clean_tokens: (B, N, C) fp32, as they were when the conditions had been put in.
        positions: (3, N) fp32: seconds, pixels down, pixels right.
        grid: of the video. Its tokens come first; a condition may append more behind them.
        conditioning_mask: (B, N) fp32 in [0, 1], how firmly each token is held to `clean_tokens`; None where nothing is.
    """

    tokens: Tensor
    clean_tokens: Tensor
    positions: Tensor
    grid: LatentGrid
    conditioning_mask: Tensor | None = None

    @classmethod
    def from_latents(cls, latents: Tensor, positions: Tensor, grid: LatentGrid) -> LatentState:
        """The state before any condition, from noise or latents (B, C, f, h, w)."""
        tokens = to_tokens(latents)
        return cls(tokens=tokens, clean_tokens=tokens, positions=positions, grid=grid)

    def sigma_per_token(self, sigma: Tensor) -> Tensor:
        """The level of each token, (B, N), when the sampling is at `sigma`; (B, 1) where no token is held."""
        if self.conditioning_mask is None:
            return sigma.expand(len(self.tokens), 1)
        return torch.minimum(sigma, 1.0 - self.conditioning_mask)

    def advance(self, tokens: Tensor, sigma: Tensor) -> LatentState:
        """The state after a step. A token that is held until a level below `sigma` stays as it is."""
        if self.conditioning_mask is not None:
            moves = sigma - SIGMA_TOLERANCE < 1.0 - self.conditioning_mask
            tokens = torch.where(moves[..., None], tokens, self.tokens)
        return replace(self, tokens=tokens)

    def latents(self) -> Tensor:
        """The video's latents (B, C, f, h, w), without appended tokens."""
        return to_latents(self.tokens[:, : self.grid.num_tokens], self.grid)
