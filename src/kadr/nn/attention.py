"""Multi-head attention with normalised queries and keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kadr.kernels import attention, fused
from kadr.kernels.cpu import attention as cpu_attention
from kadr.nn.linear import Linear, is_coarse, several
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
        q, kept = self._among(x, rope) if kept is None else (self.q(x), kept)
        q = self._normalised(q, self.q_norm, rope)
        # Queries and keys of 8-bit products are off by a per cent: logits rounded to bfloat16 add little to that.
        attended = attend(q, *kept, bias, coarse=is_coarse(self.q))
        return self.out(attended.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of context (B, M, X): they are the same for every x."""
        k, v = several(context, self.k, self.v)
        return KeysValues(self._normalised(k, self.k_norm, None), self._split(v))

    def _among(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, KeysValues]:
        """Queries as they come, and keys and values of x itself."""
        q, k, v = several(x, self.q, self.k, self.v)
        return q, KeysValues(self._normalised(k, self.k_norm, rope), self._split(v))

    def _normalised(self, t: Tensor, norm: RMSNorm, rope: Rope | None) -> Tensor:
        if rope is None:
            return self._split(norm(t))
        return self._split(fused.norm_rope(t, norm.weight, rope.cosine, rope.sine, norm.epsilon))

    def _split(self, t: Tensor) -> Tensor:
        """(B, M, D) -> (B, H, M, d)."""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, coarse: bool) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, by what is fastest for these inputs where they lie.

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        bias: (B, 1, 1, M).
        bf16_logits: logits may be rounded to the dtype of q.
    """
    if cpu_attention.is_faster_than_torch(q, k, bias, bf16_logits=coarse):
        return cpu_attention.attend(q, k, v, bf16_logits=coarse)
    return attention.attend(q, k, v, bias)
