"""Multi-head attention with normalised queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kadr.nn.linear import Linear, several
from kadr.nn.norm import RMSNorm
from kadr.nn.rope import Rope

# What may take the place of an attention's outcome, before its last layer.
VALUES, INPUT = "values", "input"


class KeysValues(NamedTuple):
    """What queries attend to: keys, normalised, and values, each (B, H, M, d)."""

    keys: Tensor
    values: Tensor

    def rows(self, rows: slice) -> KeysValues:
        """Of some samples of the batch."""
        return KeysValues(self.keys[rows], self.values[rows])


class Attention(nn.Module):
    """Queries and keys are normalised over all heads at once, then rotated, then split into heads."""

    def __init__(self, width: int, heads: int, *, context_width: int | None = None) -> None:
        super().__init__()
        context_width = context_width or width
        self.heads = heads
        self.q = Linear(width, width)
        self.k = Linear(context_width, width)
        self.v = Linear(context_width, width)
        self.out = Linear(width, width)
        self.q_norm = RMSNorm(width, 1e-5)
        self.k_norm = RMSNorm(width, 1e-5)

    def forward(
        self,
        x: Tensor,
        kept: KeysValues | None = None,
        *,
        rope: Rope | None = None,
        bias: Tensor | None = None,
        instead: str | None = None,
    ) -> Tensor:
        """x (B, N, D), keys and values of something else or of x itself -> (B, N, D).

        Args:
            kept: as `keys_values` made them.
            bias: added to the logits, (B, 1, 1, M).
            instead: "values" lets each token of x attend to itself alone, "input" lets the attention pass on what it
                was given; both then go through the last layer.
        """
        if instead is not None:
            return self.out(self.v(x) if instead == VALUES else x)
        if kept is None:
            q, k, v = several(x, self.q, self.k, self.v)
            kept = KeysValues(self._keys(k, rope), self._split(v))
        else:
            q = self.q(x)
        q = self.q_norm(q)
        q = self._split(q if rope is None else rope(q))
        attended = F.scaled_dot_product_attention(q, *kept, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of context (B, M, X): they are the same for every x."""
        k, v = several(context, self.k, self.v)
        return KeysValues(self._keys(k, None), self._split(v))

    def _keys(self, k: Tensor, rope: Rope | None) -> Tensor:
        k = self.k_norm(k)
        return self._split(k if rope is None else rope(k))

    def _split(self, t: Tensor) -> Tensor:
        """(B, M, D) -> (B, H, M, d)."""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
