"""Multi-head attention with RMS-normalised queries and keys (QK norm), RoPE and a KV cache for cross-attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kadr.kernels import attention, fused
from kadr.nn.linear import Linear, Quantized, linear_shared_input, modulated_input, uses_8bit_matmul
from kadr.nn.norm import RMSNorm
from kadr.nn.rope import Rope

# STG replaces the output of an attention by its values or by its input, before the output projection.
PERTURB_TO_VALUES, PERTURB_TO_INPUT = "values", "input"


class KeysValues(NamedTuple):
    """Normalised keys, and values, each (B, H, M, d). Those of cross-attention are cached over the denoising steps."""

    keys: Tensor
    values: Tensor

    def for_samples(self, samples: slice) -> KeysValues:
        """Returns the keys and values of some samples of the batch."""
        return KeysValues(self.keys[samples], self.values[samples])


class Attention(nn.Module):
    """Self-attention or cross-attention.

    Queries and keys are normalised over all heads at once, then rotated by RoPE, then split into heads.

    Args:
        width: D, of the tokens.
        context_width: of what cross-attention attends to; None: `width`.
    """

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
        x: Tensor | Quantized,
        kv: KeysValues | None = None,
        *,
        rope: Rope | None = None,
        bias: Tensor | None = None,
        perturbed_value: str | None = None,
    ) -> Tensor:
        """Attends from x (B, N, D) to a context, or to x itself, and returns (B, N, D).

        Args:
            x: quantized by `modulated_input` only for self-attention that is not perturbed.
            kv: keys and values from `project_kv`, for cross-attention; None: self-attention.
            rope: for self-attention.
            bias: added to the logits, (B, 1, 1, M).
            perturbed_value: for STG. "values" replaces the attention's output by the values of x, as if each token
                attended only to itself; "input" replaces it by x. Both then go through the output projection.
        """
        if perturbed_value is not None:
            return self.out(self.v(x) if perturbed_value == PERTURB_TO_VALUES else x)
        if kv is None:
            q, kv = self._project_qkv(x, rope)
        else:
            (q,) = linear_shared_input(x, self.q)
        q = self._norm_rotate_split(q, self.q_norm, rope, factor=(q.shape[-1] // self.num_heads) ** -0.5)
        attended = attention.attend(q, *kv, bias, may_round=uses_8bit_matmul(self.q))
        return self.out(attended.transpose(1, 2).flatten(2))

    def project_kv(self, context: Tensor) -> KeysValues:
        """Projects a context (B, M, context_width) to keys and values. They can be cached: x does not change them."""
        k, v = linear_shared_input(context, self.k, self.v)
        return KeysValues(self._norm_rotate_split(k, self.k_norm, None), self._split_heads(v))

    def modulated_input(
        self, x: Tensor, scale: Tensor, shift: Tensor, perturbed_value: str | None
    ) -> Tensor | Quantized:
        """Returns the input of self-attention as a branch of a block: norm and modulation of x (B, N, D)."""
        if perturbed_value is not None:
            return fused.norm_modulate(x, scale, shift)
        return modulated_input(x, scale, shift, self.q, self.k, self.v)

    def _project_qkv(self, x: Tensor | Quantized, rope: Rope | None) -> tuple[Tensor, KeysValues]:
        """Projects x to raw queries (B, N, D), and to keys and values for self-attention."""
        q, k, v = linear_shared_input(x, self.q, self.k, self.v)
        return q, KeysValues(self._norm_rotate_split(k, self.k_norm, rope), self._split_heads(v))

    def _norm_rotate_split(self, t: Tensor, norm: RMSNorm, rope: Rope | None, *, factor: float = 1.0) -> Tensor:
        rotation = None if rope is None else rope.rotation
        return self._split_heads(fused.norm_rope(t, norm.weight, rotation, norm.epsilon, factor))

    def _split_heads(self, t: Tensor) -> Tensor:
        """Splits heads, (B, M, D) -> (B, H, M, d)."""
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
