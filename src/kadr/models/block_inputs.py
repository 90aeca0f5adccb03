"""Inputs that all transformer blocks share: the text's KV cache, the adaLN modulation and RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from kadr.nn.attention import Attention, KeysValues
from kadr.nn.rope import Rope


class TextKVCache:
    """Cross-attention keys and values of a text, computed once per block and reused in every denoising step.

    Args:
        text: projected prompt embeddings (B, L, D); None if all keys and values are in `kv`.
        bias: (B, 1, 1, L) for the logits of cross-attention; None if nothing is padded.
        kv: keys and values computed so far, by their attention.
    """

    def __init__(
        self, text: Tensor | None, bias: Tensor | None, kv: Mapping[nn.Module, KeysValues] | None = None
    ) -> None:
        self.text, self.bias = text, bias
        self._kv = dict(kv or {})

    def get(self, attention: Attention) -> KeysValues:
        """Returns the keys and values for one cross-attention; computes them on first use."""
        if attention not in self._kv:
            assert self.text is not None
            self._kv[attention] = attention.project_kv(self.text)
        return self._kv[attention]


class BlockInputs(NamedTuple):
    """Inputs of every transformer block besides the tokens.

    Args:
        adaln: (B, 1 or N, 6, D), the timestep's part of the modulation.
        samples: samples of the text's batch that the tokens belong to.
    """

    text_kv: TextKVCache
    adaln: Tensor
    rope: Rope
    samples: slice = slice(None)

    def for_samples(self, samples: slice) -> BlockInputs:
        """Returns the inputs for some samples of the batch."""
        return BlockInputs(self.text_kv, self.adaln[samples], self.rope.for_samples(samples), samples)
