"""The text encoder: the encoder half of T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202).

Three things set it apart from a common transformer: queries and keys are not scaled by 1/sqrt(width), positions enter
only as one learned bias per head and distance that all layers share, and there is no additive term in any layer.
Released weights overflow in float16; run them in bfloat16 or float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kadr.errors import CheckpointError
from kadr.nn.init import init_normal
from kadr.nn.linear import Linear

# Transformers reads an absent feed_forward_proj as "relu", so that one must be said; the rest is asked only if said.
_FIXED_HEADER_VALUES = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}
_REQUIRED_KEYS = ("model_type", "feed_forward_proj")


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, by their names in `config.json`.

    Args:
        vocab_size: rows of the embedding; at least the tokenizer's size.
        d_model: D, of the residual stream.
        num_heads, d_kv: num_heads * d_kv need not equal `d_model`.
        d_ff: between the two matrices of the feed-forward.
        relative_attention_num_buckets: distances told apart, both directions together.
        relative_attention_max_distance: tokens; from here on all distances share the last bucket of their direction.
        layer_norm_epsilon: added to the mean square in every norm.

    Raises:
        CheckpointError: a size that no encoder can have.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_kv: int
    d_ff: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), float if field.name == "layer_norm_epsilon" else int
            if type(value) is not kind or not 0 < value < math.inf:
                _refuse(field.name, value, f"a positive {'number' if kind is float else 'whole number'}")
        if self.relative_attention_num_buckets % 4:
            _refuse(
                "relative_attention_num_buckets",
                self.relative_attention_num_buckets,
                "a multiple of 4: two directions, each half near and half far",
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            _refuse(
                "relative_attention_max_distance",
                self.relative_attention_max_distance,
                f"more than {self.relative_attention_num_buckets // 4}, a quarter of the buckets",
            )

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> T5Config:
        """Read the `config.json` of a transformers folder. Keys that do not shape the encoder are ignored.

        Raises:
            CheckpointError: a size is absent or impossible, or the file describes another architecture.
        """
        for name, supported in _FIXED_HEADER_VALUES.items():
            value = header.get(name, None if name in _REQUIRED_KEYS else supported)
            if value != supported:
                _refuse(name, value, repr(supported))
        defaults = ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")
        names = [field.name for field in fields(cls)]
        absent = [name for name in names if name not in defaults and name not in header]
        if absent:
            raise CheckpointError(
                f"The text encoder's config.json lacks {', '.join(absent)}. "
                "Take the whole text_encoder folder from where the weights came from."
            )
        return cls(**{name: header[name] for name in names if name in header})


def _refuse(name: str, value: object, supported: str) -> None:
    raise CheckpointError(
        f"The text encoder's {name} is {value!r}; it must be {supported}. Use the encoder of google/t5-v1_1-xxl."
    )


@cache
def _log_bucket_edges(near: int, max_distance: int) -> tuple[int, ...]:
    """The distances at which a new far bucket starts: the least n with near * ln(n/near) / ln(max/near) >= 1, 2, ...

    In whole numbers, because the powers of two sit exactly on an edge and a rounded logarithm may fall on either side.
    """
    return tuple(
        next(n for n in count(near) if n**near * near**k >= max_distance**k * near**near) for k in range(1, near)
    )


def relative_position_bucket(relative_position: Tensor, *, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Number the distance from a query to a key (T5 paper, section 2.1; bidirectional).

    Half of the buckets are for keys ahead. In each direction, one half of the rest holds the distances 0, 1, 2, ...
    and the other half grows logarithmically up to `max_distance`.

    Args:
        relative_position: int64, any shape: position of the key minus position of the query.

    Returns:
        int64 of the same shape, in [0, buckets).
    """
    near = num_buckets // 4
    steps = relative_position.abs()
    bucket = steps.clamp(max=near)
    for edge in _log_bucket_edges(near, max_distance):
        bucket = bucket + (steps >= edge)
    return bucket + (relative_position > 0) * (num_buckets // 2)


class T5Norm(nn.Module):
    """Divide by the root mean square, then weigh. The mean is not subtracted."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        # The product is in float32 and is rounded before it is weighed: the order the weights were released with.
        return self.weight * (x * scale).to(self.weight.dtype)


class T5Attention(nn.Module):
    """Tokens look at each other; the logits are q·k + bias, unscaled (the scale lives in the weights)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # x (B, L, D), bias (B, heads, L, L) -> (B, L, D)
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(seen.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Each token thinks alone: down(gelu(gate x) * up x), with the tanh form of gelu."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=False)
        self.up = Linear(config.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class T5Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normed copy and added back."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.attention = T5Attention(config)
        self.feed_forward_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = T5FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # x (B, L, D), bias (B, heads, L, L) -> (B, L, D)
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


class T5Encoder(nn.Module):
    """Token ids to one vector per token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(
            config.vocab_size, config.d_model, _weight=init_normal(config.vocab_size, config.d_model)
        )
        self.position_bias = nn.Embedding(
            config.relative_attention_num_buckets,
            config.num_heads,
            _weight=init_normal(config.relative_attention_num_buckets, config.num_heads),
        )
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.final_norm = T5Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode.

        Args:
            ids: int64 (B, L), each in [0, vocabulary).
            mask: bool or integer (B, L); true or non-zero where a token is real. Padding is never looked at.

        Returns:
            (B, L, D) in the weights' dtype. Positions of padding hold numbers without meaning: mask them later too.
        """
        x = self.embedding(ids)
        bias = self._attention_bias(mask).to(x.dtype)
        for block in self.blocks:
            x = block(x, bias)
        return self.final_norm(x)

    def _attention_bias(self, mask: Tensor) -> Tensor:
        """(B, L) -> (B, heads, L, L): what every layer adds to its logits, by query and key."""
        position = torch.arange(mask.shape[1], device=mask.device)
        distance = position[None, :] - position[:, None]
        bucket = relative_position_bucket(
            distance,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        bias = self.position_bias(bucket).permute(2, 0, 1)
        # The least finite number, not -inf: a sample that is all padding must not become NaN.
        return torch.where(mask[:, None, None, :].bool(), bias, torch.finfo(bias.dtype).min).contiguous()


@torch.no_grad()
def initialise_t5(encoder: T5Encoder, generator: torch.Generator) -> None:
    """Draw fresh weights in place, as T5 v1.1 was initialised (Mesh TensorFlow's scheme, as kept by transformers).

    A zero-mean normal whose deviation makes up for what the attention does not scale.

    Args:
        generator: on the device of the weights.
    """
    config = encoder.config
    inward = config.d_model**-0.5

    def draw(weight: Tensor, deviation: float) -> None:
        weight.normal_(0.0, deviation, generator=generator)

    draw(encoder.embedding.weight, 1.0)
    draw(encoder.position_bias.weight, inward)
    encoder.final_norm.weight.fill_(1.0)
    for block in encoder.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        block.attention_norm.weight.fill_(1.0)
        block.feed_forward_norm.weight.fill_(1.0)
        draw(attention.q.weight, (config.d_model * config.d_kv) ** -0.5)
        draw(attention.k.weight, inward)
        draw(attention.v.weight, inward)
        draw(attention.o.weight, (config.num_heads * config.d_kv) ** -0.5)
        draw(feed_forward.gate.weight, inward)
        draw(feed_forward.up.weight, inward)
        draw(feed_forward.down.weight, config.d_ff**-0.5)
