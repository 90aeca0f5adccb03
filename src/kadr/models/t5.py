"""The text encoder: the encoder half of T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202).

Three things distinguish it from a standard transformer: attention logits are not scaled by 1/sqrt(width), positions
enter only as one learned bias per head and distance that all blocks share, and no layer has a bias.
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

from kadr.cancellation import check_cancelled
from kadr.errors import CheckpointError
from kadr.nn.init import init_normal
from kadr.nn.linear import Linear
from kadr.nn.padding import unpadded_length
from kadr.quoting import quote

# transformers reads a missing feed_forward_proj as "relu", so that key is required; the others are checked if present.
_FIXED_HEADER_VALUES = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}
# Largest sizes in a config, several times those of T5 XXL.
_MAX_T5_SIZES = {
    "vocab_size": 1 << 20,
    "d_model": 1 << 15,
    "num_layers": 256,
    "num_heads": 512,
    "d_kv": 1024,
    "d_ff": 1 << 17,
    "relative_attention_num_buckets": 128,
    "relative_attention_max_distance": 4096,
}
_REQUIRED_KEYS = ("model_type", "feed_forward_proj")


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder, named as in `config.json`.

    Args:
        vocab_size: rows of the embedding; at least the tokenizer's size.
        d_model: D, of the residual stream.
        num_heads, d_kv: num_heads * d_kv need not equal `d_model`.
        d_ff: width inside the feed-forward.
        relative_attention_num_buckets: buckets of distances, for both directions in all.
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
            if value > (maximum := _MAX_T5_SIZES.get(field.name, 1)):
                _refuse(field.name, value, f"at most {maximum}")
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
        """Reads the `config.json` of a transformers folder. Ignores keys that do not affect the encoder.

        Raises:
            CheckpointError: a size is missing or impossible, or the file describes another architecture.
        """
        for name, supported in _FIXED_HEADER_VALUES.items():
            value = header.get(name, None if name in _REQUIRED_KEYS else supported)
            if value != supported:
                _refuse(name, value, repr(supported))
        optional = ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")
        names = [field.name for field in fields(cls)]
        absent = [name for name in names if name not in optional and name not in header]
        if absent:
            raise CheckpointError(
                f"The text encoder's config.json lacks {', '.join(absent)}. "
                "Take the whole text_encoder folder from where the weights came from."
            )
        return cls(**{name: header[name] for name in names if name in header})


T5_XXL = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)


def _refuse(name: str, value: object, supported: str) -> None:
    raise CheckpointError(
        f"The text encoder's {name} is {quote(value)}; it must be {supported}. Use the encoder of google/t5-v1_1-xxl."
    )


@cache
def _log_bucket_edges(near: int, max_distance: int) -> tuple[int, ...]:
    """Returns the distances where far buckets start: the least n with near * ln(n/near) / ln(max/near) >= 1, 2, ...

    Computed in integers, because powers of two are exactly on an edge and a rounded logarithm may fall on either side.
    """
    return tuple(
        next(n for n in count(near) if n**near * near**k >= max_distance**k * near**near) for k in range(1, near)
    )


def relative_position_bucket(relative_position: Tensor, *, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Maps the distance from a query to a key to a bucket (T5 paper, section 2.1; bidirectional).

    Half of the buckets are for keys after the query. In each direction, half of the buckets are for single distances
    0, 1, 2, ..., and the other half grow logarithmically up to `max_distance`.

    Args:
        relative_position: int64, any shape: position of the key minus position of the query.

    Returns:
        int64 of the same shape, in [0, num_buckets).
    """
    near = num_buckets // 4
    steps = relative_position.abs()
    bucket = steps.clamp(max=near)
    for edge in _log_bucket_edges(near, max_distance):
        bucket = bucket + (steps >= edge)
    return bucket + (relative_position > 0) * (num_buckets // 2)


class T5Norm(nn.Module):
    """RMS norm with a learned weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        # The float32 product is rounded before the weight is applied, as in the released implementation.
        return self.weight * (x * scale).to(self.weight.dtype)


class T5Attention(nn.Module):
    """Self-attention with logits q·k + bias, unscaled (the weights contain the scale)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # x (B, L, D), bias (B, heads, L, L) -> (B, L, D)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Gated feed-forward: down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=False)
        self.up = Linear(config.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class T5Block(nn.Module):
    """Self-attention, then feed-forward, both pre-norm with a residual connection."""

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
    """Encodes token ids to prompt embeddings, one vector per token."""

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
        """Encodes tokens. Does not compute the padding behind the longest prompt: no token attends to it.

        A sample that is all padding attends to all of it, as in transformers; then all positions are computed.

        Args:
            ids: int64 (B, L), each in [0, vocab_size).
            mask: bool or integer (B, L); true or non-zero for tokens that are not padding. No token attends to padding.

        Returns:
            (B, L, D) in the weights' dtype. Padding behind the longest prompt is zero; other padding has meaningless
            values: mask it later too.
        """
        longest = unpadded_length(mask)
        return F.pad(self._encode(ids[:, :longest], mask[:, :longest]), (0, 0, 0, ids.shape[1] - longest))

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encodes tokens (B, L) and computes all positions (B, L, D)."""
        x = self.embedding(ids)
        bias = self._attention_bias(mask).to(x.dtype)
        for block in self.blocks:
            check_cancelled()
            x = block(x, bias)
        return self.final_norm(x)

    def _attention_bias(self, mask: Tensor) -> Tensor:
        """Computes the bias of every block's attention logits, (B, heads, L, L), from the mask (B, L)."""
        length = mask.shape[1]
        bucket = relative_position_bucket(
            torch.arange(1 - length, length, device=mask.device),
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        by_distance = self.position_bias(bucket).T.contiguous()  # (heads, 2 L - 1)
        # The keys of query i have the distances -i, 1 - i, ..., L - 1 - i: a window, which moves back query by query.
        bias = by_distance.unfold(1, length, 1).flip(1)
        # The lowest finite number, not -inf: a sample that is all padding must not become NaN.
        return torch.where(mask[:, None, None, :].bool(), bias, torch.finfo(bias.dtype).min).contiguous()


@torch.no_grad()
def initialise_t5(encoder: T5Encoder, generator: torch.Generator) -> None:
    """Initialises weights in place as T5 v1.1 was (Mesh TensorFlow's scheme, as in transformers).

    Weights are normal with mean 0; the standard deviation of the queries contains the scale that the attention omits.

    Args:
        generator: on the device of the weights.
    """
    config = encoder.config
    input_std = config.d_model**-0.5

    def draw(weight: Tensor, std: float) -> None:
        weight.normal_(0.0, std, generator=generator)

    draw(encoder.embedding.weight, 1.0)
    draw(encoder.position_bias.weight, input_std)
    encoder.final_norm.weight.fill_(1.0)
    for block in encoder.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        block.attention_norm.weight.fill_(1.0)
        block.feed_forward_norm.weight.fill_(1.0)
        draw(attention.q.weight, (config.d_model * config.d_kv) ** -0.5)
        draw(attention.k.weight, input_std)
        draw(attention.v.weight, input_std)
        draw(attention.o.weight, (config.num_heads * config.d_kv) ** -0.5)
        draw(feed_forward.gate.weight, input_std)
        draw(feed_forward.up.weight, input_std)
        draw(feed_forward.down.weight, config.d_ff**-0.5)
