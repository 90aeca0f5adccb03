"""The latent state that a sampler works on: replaced at every step, never changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kadr.shapes import LatentGrid

if TYPE_CHECKING:  # a request checks the name of its sampler, and must not wait for torch
    from torch import Tensor

SIGMA_TOLERANCE = 1e-6  # two sigmas nearer than this are the same


def to_tokens(latents: Tensor) -> Tensor:
    """Flattens latents (B, C, f, h, w) to tokens (B, N, C): frame by frame, row by row, column by column."""
    return latents.flatten(2).transpose(1, 2)


def to_latents(tokens: Tensor, grid: LatentGrid) -> Tensor:
    """Restores latents (B, C, f, h, w) from tokens (B, N, C)."""
    return tokens.transpose(1, 2).unflatten(2, (grid.frames, grid.height, grid.width))


@dataclass(frozen=True)
class LatentState:
    """Latent tokens between noise and video.

    Args:
        tokens: (B, N, C) fp32, at the current step.
        clean_tokens: (B, N, C) fp32, right after the conditions were applied: the conditioning latents where the mask
            is 1, the initial noise where it is 0, a mix of both between.
        positions: (3, N) fp32: seconds, pixels down, pixels right.
        grid: of the video. Its tokens come first; conditions may append more.
        conditioning_mask: (B, N) fp32 in [0, 1]: 1 keeps a token at its `clean_tokens`, 0 leaves it free; None where
            no token is conditioned.
    """

    tokens: Tensor
    clean_tokens: Tensor
    positions: Tensor
    grid: LatentGrid
    conditioning_mask: Tensor | None = None

    @classmethod
    def from_latents(cls, latents: Tensor, positions: Tensor, grid: LatentGrid) -> LatentState:
        """Makes the state before any condition, from noise or latents (B, C, f, h, w)."""
        tokens = to_tokens(latents)
        return cls(tokens=tokens, clean_tokens=tokens, positions=positions, grid=grid)

    def sigma_per_token(self, sigma: Tensor) -> Tensor:
        """Returns the sigma of each token, (B, N), when the sampler is at `sigma`; (B, 1) without conditions."""
        if self.conditioning_mask is None:
            return sigma.expand(len(self.tokens), 1)
        return sigma.minimum(1.0 - self.conditioning_mask)

    def is_moving(self, sigma: Tensor) -> Tensor:
        """Tells which tokens a step from `sigma` moves, (B, N) bool; (B, 1) without conditions.

        A conditioned token stays until 1 - its mask reaches `sigma`.
        """
        return sigma - SIGMA_TOLERANCE < self.sigma_per_token(sigma)

    def advance(self, tokens: Tensor, sigma: Tensor) -> LatentState:
        """Returns the state after a step from `sigma`. A conditioned token stays until 1 - its mask reaches `sigma`."""
        if self.conditioning_mask is not None:
            tokens = tokens.where(self.is_moving(sigma)[..., None], self.tokens)
        return replace(self, tokens=tokens)

    def latents(self) -> Tensor:
        """Returns the video's latents (B, C, f, h, w), without appended tokens."""
        return to_latents(self.tokens[:, : self.grid.num_tokens], self.grid)
