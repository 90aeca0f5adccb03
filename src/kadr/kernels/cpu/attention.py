"""Attention in bfloat16 on CPUs by two large products of oneDNN, whose exponentials are computed as it multiplies.

oneDNN can apply a sigmoid to the float32 sums of a product before it rounds them. Where x is far below 0, sigmoid(x) is
exp(x) but for a share of exp(x): so the logits, less a bound of their own, go through a sigmoid and come out as the
weights of softmax up to a common factor, rounded once, as torch's are. The bound is |q| |k| by Cauchy and Schwarz,
plus a margin. It is the same for all queries of a head, as a bias of the keys; the common factor cancels when
the weighted sum of values is divided by the sum of weights.

Both products run at the speed of large matrices, and a softmax in float32 is never written to memory. Measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.cancellation import check_cancelled
from kadr.kernels.matmul import uses_onednn

WEIGHT_BYTES = 3_000_000  # weights of softmax computed at a time; measured
MARGIN = 9.0  # logits less their bound are below it: a sigmoid is then an exponential but for exp(-9)
# Sums of weights below it lost weights that are too small for the format: the bound was far above the logits.
MIN_SUM = 2.0**-100
KEY_ALIGNMENT = 16  # keys are padded to a multiple, as partial sums need it
# Sums of weights are rounded to bfloat16 for so many parts of the keys, whose errors cancel, then added in float32.
PARTIAL_SUMS = 16
MASKED = -1000.0  # a bias below it leaves no weight
MASK_BIAS = -10_000.0  # of keys without weight
MIN_PREPACKED_SLICES = 3  # of queries, for which reordering keys and values once is faster than each time


def is_supported(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `attend` and `attend_rounded` compute these inputs, on a CPU that multiplies in bfloat16."""
    return uses_onednn(q) and q.dtype == k.dtype == v.dtype and (bias is None or is_mask(bias))


def is_mask(bias: Tensor) -> bool:
    """Returns whether a bias (B, 1, 1, M) lets each key take part as it is or not at all, and some in each sample."""
    takes_part = bias == 0
    return bool((takes_part | (bias <= MASKED)).all()) and bool(takes_part.any(-1).all())


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes softmax(q kᵀ + bias) v, about as exactly as torch.

    Args:
        q: (B, H, N, d), bfloat16.
        k, v: (B, H, M, d), bfloat16.
        bias: (B, 1, 1, M) that `is_mask` accepts.

    Returns:
        (B, H, N, d), bfloat16, in the memory order (B, N, H, d).
    """
    return _attend(q, k, v, bias, is_exact=True)


def attend_rounded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `attend` with sums of values rounded to bfloat16 before they are divided: a fifth faster."""
    return _attend(q, k, v, bias, is_exact=False)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, is_exact: bool) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    output = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype)
    if bias is not None and not is_mask(bias):
        raise ValueError("the bias is not a mask")
    for index in range(batch):
        is_kept = None if bias is None else bias[index, 0, 0] == 0
        key_bias = _key_bias(_bound_logits(q[index], k[index]).to(q.dtype), k.shape[2], is_kept)
        for head in range(heads):
            _attend_head(
                q[index, head], k[index, head], v[index, head], key_bias[head], output[index, :, head], is_exact
            )
    return output.transpose(1, 2)


def _key_bias(bound: Tensor, keys: int, is_kept: Tensor | None) -> Tensor:
    """Returns what is added to the logits of the keys of each head, padded (H, M'): minus the bound (H)."""
    key_bias = (-bound)[:, None].repeat(1, keys + -keys % KEY_ALIGNMENT)
    key_bias[:, keys:] = MASK_BIAS
    if is_kept is not None:
        key_bias[:, :keys].masked_fill_(~is_kept, MASK_BIAS)
    return key_bias


def _attend_head(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, output: Tensor, is_exact: bool) -> None:
    """Writes the attention of one head into `output` (N, d). q: (N, d), k, v: (M, d), key_bias: (M')."""
    padding = len(key_bias) - len(k)
    queries = q.contiguous()
    key_matrix, value_matrix = (F.pad(t, (0, 0, 0, padding)) if padding else t.contiguous() for t in (k, v))
    value_matrix = value_matrix.t()
    count = max(1, -(-len(q) * len(key_bias) * q.itemsize // WEIGHT_BYTES))
    if count >= MIN_PREPACKED_SLICES:
        key_matrix, value_matrix = map(torch.ops.mkldnn._reorder_linear_weight, (key_matrix, value_matrix))
    slices: list[_Sums] = []
    for rows in queries.split(-(-len(q) // count)):
        check_cancelled()
        slices.append(_sum_slice(rows, key_matrix, value_matrix, key_bias, is_exact))
    values, remainders, weights = slices[0] if count == 1 else map(torch.cat, zip(*slices, strict=True))
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    sums = values.float()
    output.copy_((sums.add_(remainders) if is_exact else sums).div_(total))
    is_kept = total >= MIN_SUM
    if not bool(is_kept.all()):
        lost = is_kept.logical_not_()[:, 0].nonzero()[:, 0]
        output[lost] = _attend_widely(q[lost], k, v, key_bias[: len(k)]).to(output.dtype)


class _Sums(NamedTuple):
    """Sums over the keys for some queries: of weighted values, what rounding left out of them, and of weights."""

    values: Tensor  # (N, d)
    remainders: Tensor  # (N, d); (0, d) where they are not computed
    weights: Tensor  # (N, PARTIAL_SUMS)


def _sum_slice(q: Tensor, key_matrix: Tensor, value_matrix: Tensor, key_bias: Tensor, is_exact: bool) -> _Sums:
    """Computes the sums for some queries (N, d).

    oneDNN rounds sums of values to bfloat16. A second product less the rounded sums gives what rounding left out.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    weights = linear(q, key_matrix, key_bias, "sigmoid", [], "")
    values = linear(weights, value_matrix, None, "none", [], "")
    remainders = linear.binary(weights, values, value_matrix, None, "sub") if is_exact else values[:0]
    return _Sums(values, remainders, weights.unflatten(-1, (PARTIAL_SUMS, -1)).sum(-1))


def _bound_logits(q: Tensor, k: Tensor) -> Tensor:
    """Returns a bound of the logits of each head (H), with the margin; NaN where an input is not finite."""
    largest_q, largest_k = (torch.linalg.vector_norm(t, dim=-1).amax(-1).float() for t in (q, k))
    return largest_q * largest_k * (1 + 2.0**-6) + MARGIN  # the norms are rounded to bfloat16


def _attend_widely(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Tensor:
    """Attends with logits of any spread in float32: q (N, d), k and v (M, d). key_bias: (M), as for a sigmoid."""
    logits = (q.float() @ k.float().t()).masked_fill_(key_bias == MASK_BIAS, float("-inf"))
    return logits.softmax(-1) @ v.float()
