"""Multi-head attention with normalised queries and keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kadr.kernels import attention, fused
from kadr.kernels.cpu import attention as cpu_attention
from kadr.nn.linear import Linear, linear_shared_input, uses_8bit_matmul
from kadr.nn.norm import RMSNorm
from kadr.nn.rope import Rope

# What may take the place of an attention's outcome, before its last layer.
PERTURB_TO_VALUES, PERTURB_TO_INPUT = "values", "input"


class KeysValues(NamedTuple):
    """What queries attend to: keys, normalised, and values, each (B, H, M, d)."""

    keys: Tensor
    values: Tensor

    def for_samples(self, samples: slice) -> KeysValues:
        """Of some samples of the batch."""
        return KeysValues(self.keys[samples], self.values[samples])


class Attention(nn.Module):
    """Queries and keys are normalised over all heads at once, then rotated, then split into heads."""

    def __init__(self, width: int, num_heads: int, *, context_width: int | None = None) -> None:
        super().__init__()
        context_width = context_width or width
        self.num_heads = num_heads
        self.q = Linear(width, width)
        self.k = Linear(context_width, width)
        self.v = Linear(context_width, width)
        self.out = Linear(width, width)
        self.q_norm = RMSNorm(width, 1e-5)
        self.k_norm = RMSNorm(width, 1e-5)

    def forward(
        self,
        x: Tensor,
        kv: KeysValues | None = None,
        *,
        rope: Rope | None = None,
        bias: Tensor | None = None,
        perturbed_value: str | None = None,
    ) -> Tensor:
        """x (B, N, D), keys and values of something else or of x itself -> (B, N, D).

        Args:
            kv: as `keys_values` made them.
            bias: added to the logits, (B, 1, 1, M).
            perturbed_value: "values" lets each token of x attend to itself alone, "input" lets the attention pass on what it
                was given; both then go through the last layer.
        """
        if perturbed_value is not None:
            return self.out(self.v(x) if perturbed_value == PERTURB_TO_VALUES else x)
        q, kv = self._project_qkv(x, rope) if kv is None else (self.q(x), kv)
        q = self._norm_rotate_split(q, self.q_norm, rope)
        # Queries and keys of 8-bit products are off by a per cent: logits rounded to bfloat16 add little to that.
        attended = attend(q, *kv, bias, bf16_logits=uses_8bit_matmul(self.q))
        return self.out(attended.transpose(1, 2).flatten(2))

    def project_kv(self, context: Tensor) -> KeysValues:
        """Of context (B, M, X): they are the same for every x."""
        k, v = linear_shared_input(context, self.k, self.v)
        return KeysValues(self._norm_rotate_split(k, self.k_norm, None), self._split_heads(v))

    def _project_qkv(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, KeysValues]:
        """Queries as they come, and keys and values of x itself."""
        q, k, v = linear_shared_input(x, self.q, self.k, self.v)
        return q, KeysValues(self._norm_rotate_split(k, self.k_norm, rope), self._split_heads(v))

    def _norm_rotate_split(self, t: Tensor, norm: RMSNorm, rope: Rope | None) -> Tensor:
        if rope is None:
            return self._split_heads(norm(t))
        return self._split_heads(fused.norm_rope(t, norm.weight, rope.cosine, rope.sine, norm.epsilon))

    def _split_heads(self, t: Tensor) -> Tensor:
        """(B, M, D) -> (B, H, M, d)."""
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, bf16_logits: bool) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, by what is fastest for these inputs where they lie.

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        bias: (B, 1, 1, M).
        bf16_logits: logits may be rounded to the dtype of q.
    """
    if cpu_attention.is_faster_than_torch(q, k, bias, bf16_logits=bf16_logits):
        return cpu_attention.attend(q, k, v, bf16_logits=bf16_logits)
    return attention.attend(q, k, v, bias)
