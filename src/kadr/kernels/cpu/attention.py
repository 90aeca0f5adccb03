"""Attention in bfloat16 on CPUs by two large products of oneDNN, whose exponentials are computed as it multiplies.

oneDNN can apply a sigmoid to the float32 sums of a product before it rounds them. Where x is far below 0, sigmoid(x) is
exp(x) but for a share of exp(x): so the logits, less a bound of their own, go through a sigmoid and come out as the
weights of softmax up to a common factor, rounded once, as torch's are. The bound is |q| |k| by Cauchy and Schwarz,
plus a margin. It is the same for all queries of a slice, as a bias of the keys; the common factor cancels when the
weighted sum of values is divided by the sum of weights.

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
        mask_bias = _mask_bias(q.dtype, k.shape[2], None if bias is None else bias[index, 0, 0])
        bounds = _bound_logits(q[index], k[index])
        for head in range(heads):
            inputs = (q[index, head], k[index, head], v[index, head], mask_bias, bounds[head])
            output[index, :, head] = _attend_head(*inputs, is_exact)
    return output.transpose(1, 2)


def _mask_bias(dtype: torch.dtype, keys: int, bias: Tensor | None) -> Tensor:
    """Returns the bias of the keys with padding to `KEY_ALIGNMENT` (M'): 0, or `MASK_BIAS` for those without weight."""
    mask_bias = torch.zeros(keys + -keys % KEY_ALIGNMENT, dtype=dtype)
    mask_bias[keys:] = MASK_BIAS
    if bias is not None:
        mask_bias[:keys].masked_fill_(bias != 0, MASK_BIAS)
    return mask_bias


def _attend_head(q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor, bounds: Tensor, is_exact: bool) -> Tensor:
    """Computes the attention of one head, fp32 (N, d). q: (N, d), k, v: (M, d), mask_bias: (M'), bounds: (N)."""
    padding = len(mask_bias) - len(k)
    key_matrix, value_matrix = (F.pad(t, (0, 0, 0, padding)) if padding else t.contiguous() for t in (k, v))
    value_matrix = value_matrix.t()
    count = max(1, -(-len(q) * len(mask_bias) * q.itemsize // WEIGHT_BYTES))
    if count >= MIN_PREPACKED_SLICES:
        key_matrix, value_matrix = map(torch.ops.mkldnn._reorder_linear_weight, (key_matrix, value_matrix))
    step, slices = -(-len(q) // count), list[_Sums]()
    for queries, slice_bounds in zip(q.contiguous().split(step), bounds.split(step), strict=True):
        check_cancelled()
        key_bias = mask_bias - slice_bounds.max()
        slices.append(_sum_slice(queries, key_matrix, value_matrix, key_bias, is_exact))
    values, remainders, weights = slices[0] if count == 1 else map(torch.cat, zip(*slices, strict=True))
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    output = values.float()
    output = (output.add_(remainders) if is_exact else output).div_(total)
    is_whole = total[:, 0] >= MIN_SUM
    if not bool(is_whole.all()):
        lost = is_whole.logical_not_().nonzero()[:, 0]
        output[lost] = _attend_widely(q[lost], k, v, mask_bias[: len(k)] == 0).float()
    return output


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
    """Returns a bound of the logits of each query (H, N), with the margin; NaN where an input is not finite."""
    q_norms, k_norms = (torch.linalg.vector_norm(tensor, dim=-1).float() for tensor in (q, k))
    return q_norms * k_norms.amax(-1, keepdim=True) * (1 + 2.0**-6) + MARGIN  # norms are rounded to bfloat16


def _attend_widely(q: Tensor, k: Tensor, v: Tensor, takes_part: Tensor) -> Tensor:
    """Attends with logits of any spread, as torch does: q (N, d), k and v (M, d). takes_part: (M)."""
    mask = None if bool(takes_part.all()) else takes_part[None, None, None]
    q, k, v = q[None, None], k[None, None], v[None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)[0, 0]
