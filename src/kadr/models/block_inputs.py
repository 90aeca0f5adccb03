"""What every transformer block is given besides its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from kadr.nn.attention import Attention, KeysValues
from kadr.nn.rope import Rope


class TextKVCache:
    """A text as the layers read it: keys and values of each layer are computed once, however many steps come.

    Args:
        text: (B, L, D); None where all keys and values are there.
        bias: (B, 1, 1, L) for the logits of the text; None where nothing is padded.
        kv: keys and values by their attention, as far as they are there.
    """

    def __init__(
        self, text: Tensor | None, bias: Tensor | None, kv: Mapping[nn.Module, KeysValues] | None = None
    ) -> None:
        self.text, self.bias = text, bias
        self._kv = dict(kv or {})

    def get(self, attention: Attention) -> KeysValues:
        """The keys and values of a layer's attention."""
        if attention not in self._kv:
            assert self.text is not None
            self._kv[attention] = attention.project_kv(self.text)
        return self._kv[attention]

    def get_all(self, attentions: Sequence[Attention]) -> tuple[KeysValues, ...] | None:
        """The keys and values of some layers' attentions; None as long as some are not there."""
        found = tuple(self._kv[attention] for attention in attentions if attention in self._kv)
        return found if len(found) == len(attentions) else None


class BlockInputs(NamedTuple):
    """What all layers are given besides the tokens.

    Args:
        adaln: (B, 1 or N, 6, D), of the noise level.
        samples: of the reading's batch, those that the tokens belong to.
    """

    text_kv: TextKVCache
    adaln: Tensor
    rope: Rope
    samples: slice = slice(None)

    def for_samples(self, samples: slice) -> BlockInputs:
        """Of some samples of the batch."""
        return BlockInputs(self.text_kv, self.adaln[samples], self.rope.for_samples(samples), samples)
