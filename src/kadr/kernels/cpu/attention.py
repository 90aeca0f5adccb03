"""Attention in bfloat16 on a CPU, by whole matrices of a few heads at a time that stay in the cache.

torch's flash attention goes through its keys in small tiles, whose products run at a sixth of the speed of a large
one. Where the logits of a head fit into the cache, large products and a softmax over whole rows take four fifths of
its time, and half of it where logits may be rounded. Measured.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kadr.kernels.matmul import uses_onednn

MAX_LOGIT_BYTES = 4_000_000  # bytes of logits at a time
MIN_LENGTH, MIN_LENGTH_BF16_LOGITS = 512, 128  # queries and keys from which on it is ahead; with fewer, calls cost more
# Of a head, for logits in float32: products of wider ones cost more than is gained; and so they do where the logits of
# one head do not fit into the cache.
MAX_HEAD_DIM = 64


def is_faster_than_torch(q: Tensor, k: Tensor, bias: Tensor | None, *, bf16_logits: bool) -> bool:
    """Whether `attend` is ahead of torch's own for these inputs."""
    if bias is not None or not uses_onednn(q):
        return False
    queries, keys, width = q.shape[2], k.shape[2], q.shape[3]
    if torch.is_grad_enabled() and q.requires_grad:
        return False
    if bf16_logits:
        return min(queries, keys) >= MIN_LENGTH_BF16_LOGITS
    return min(queries, keys) >= MIN_LENGTH and width <= MAX_HEAD_DIM and queries * keys * 4 <= MAX_LOGIT_BYTES


def attend(q: Tensor, k: Tensor, v: Tensor, *, bf16_logits: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v.

    Args:
        q: (B, H, N, d), bfloat16.
        k, v: (B, H, M, d), bfloat16.
        bf16_logits: round logits to bfloat16; else they and their softmax are in float32, as in torch's own.

    Returns:
        (B, H, N, d), bfloat16, lying as (B, N, H, d).
    """
    batch, heads, queries, width = q.shape
    kind = torch.bfloat16 if bf16_logits else torch.float32
    made = torch.empty(batch, queries, heads, width, dtype=q.dtype)
    row = k.shape[2] * kind.itemsize
    some = max(1, min(queries, MAX_LOGIT_BYTES // row))  # queries at a time, and then heads
    together = max(1, min(heads, MAX_LOGIT_BYTES // (some * row))) if some == queries else 1
    logits = torch.empty(together * some * k.shape[2], dtype=kind)
    for sample in range(batch):
        asking = q[sample].to(kind, copy=True, memory_format=torch.contiguous_format).mul_(width**-0.5)
        keys, values = k[sample].to(kind, memory_format=torch.contiguous_format), v[sample].contiguous()
        for head in range(0, heads, together):
            own = slice(head, head + together)
            for start in range(0, queries, some):
                piece = slice(start, start + some)
                made[sample, piece, own] = _softmax_attention(asking[own, piece], keys[own], values[own], logits)
    return made.transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """q, already scaled, k and v (H, N or M, d) -> (N, H, d). logits: room for H x N x M of them."""
    shape = (len(q), q.shape[1], k.shape[1])
    shares = torch.bmm(q, k.transpose(1, 2), out=logits[: prod(shape)].view(shape))
    torch.softmax(shares, -1, out=shares)
    return torch.bmm(shares.to(v.dtype), v).transpose(0, 1)
