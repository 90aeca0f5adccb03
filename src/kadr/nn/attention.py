"""Multi-head attention with normalised queries and keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kadr.nn.linear import Linear
from kadr.nn.norm import RMSNorm
from kadr.nn.rope import Rope

# What may take the place of an attention's outcome, before its last layer.
VALUES, INPUT = "values", "input"


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
        context: Tensor | None = None,
        *,
        rope: Rope | None = None,
        bias: Tensor | None = None,
        instead: str | None = None,
    ) -> Tensor:
        """x (B, N, D), context (B, M, X) or x itself, bias added to the logits (B, 1, 1, M) -> (B, N, D).

        Args:
            instead: "values" lets each token of x attend to itself alone, "input" lets the attention pass on what it
                was given; both then go through the last layer.
        """
        if instead is not None:
            return self.out(self.v(x) if instead == VALUES else x)
        context = x if context is None else context
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(context)), self.v(context)
        if rope is not None:
            q, k = rope(q), rope(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))
