"""Attention in bfloat16 on CPUs, by matmuls over a few whole heads at a time, whose logits stay in the cache.

torch's flash attention walks through the keys in small blocks, whose matmuls run at a sixth of the speed of large ones.
Where the logits of a head fit into the cache, large matmuls and a softmax over whole rows take four fifths of its time,
and half of it where logits may be rounded to bfloat16. Measured.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kadr.cancellation import check_cancelled
from kadr.kernels.matmul import uses_onednn

MAX_LOGIT_BYTES = 4_000_000  # logits computed at a time
MIN_LENGTH, MIN_LENGTH_BF16_LOGITS = 512, 128  # queries and keys; with fewer, the overhead of calls outweighs the gain
# For logits in float32: matmuls of wider heads cost more than is gained, and so do heads whose logits do not fit into
# the cache.
MAX_HEAD_DIM = 64


def is_faster_than_torch(q: Tensor, k: Tensor, bias: Tensor | None, *, bf16_logits: bool) -> bool:
    """Returns whether `attend` is faster than torch's own attention for these inputs."""
    if bias is not None or not uses_onednn(q):
        return False
    queries, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
    if torch.is_grad_enabled() and q.requires_grad:
        return False
    if bf16_logits:
        return min(queries, keys) >= MIN_LENGTH_BF16_LOGITS
    return min(queries, keys) >= MIN_LENGTH and head_dim <= MAX_HEAD_DIM and queries * keys * 4 <= MAX_LOGIT_BYTES


def attend(q: Tensor, k: Tensor, v: Tensor, *, bf16_logits: bool = False) -> Tensor:
    """Computes softmax(q kᵀ / √d) v.

    Args:
        q: (B, H, N, d), bfloat16.
        k, v: (B, H, M, d), bfloat16.
        bf16_logits: round logits to bfloat16; else they and their softmax are in float32, as in torch's own.

    Returns:
        (B, H, N, d), bfloat16, in the memory order (B, N, H, d).
    """
    batch, heads, queries, head_dim = q.shape
    logits_dtype = torch.bfloat16 if bf16_logits else torch.float32
    output = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype)
    row_bytes = k.shape[2] * logits_dtype.itemsize
    query_step = max(1, min(queries, MAX_LOGIT_BYTES // row_bytes))
    head_step = max(1, min(heads, MAX_LOGIT_BYTES // (query_step * row_bytes))) if query_step == queries else 1
    logits = torch.empty(head_step * query_step * k.shape[2], dtype=logits_dtype)
    for sample in range(batch):
        scaled_q = q[sample].to(logits_dtype, copy=True, memory_format=torch.contiguous_format).mul_(head_dim**-0.5)
        keys, values = k[sample].to(logits_dtype, memory_format=torch.contiguous_format), v[sample].contiguous()
        for head in range(0, heads, head_step):
            part = slice(head, head + head_step)
            for start in range(0, queries, query_step):
                check_cancelled()
                rows = slice(start, start + query_step)
                output[sample, rows, part] = _softmax_attention(scaled_q[part, rows], keys[part], values[part], logits)
    return output.transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """Attends with q, already scaled, k and v (H, N or M, d) -> (N, H, d). logits: workspace of H x N x M elements."""
    shape = (len(q), q.shape[1], k.shape[1])
    weights = torch.bmm(q, k.transpose(1, 2), out=logits[: prod(shape)].view(shape))
    torch.softmax(weights, -1, out=weights)
    return torch.bmm(weights.to(v.dtype), v).transpose(0, 1)
