"""CPU attention by large matmuls is about as exact as torch's, and less so with bf16 logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import mode
from kadr.kernels.cpu import attention as cpu_attention
from kadr.kernels.matmul import has_bf16_units
from tests.oracles import randn, relative_error


def inputs(queries: int, keys: int, heads: int = 4, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v in a transformer's memory order: the heads of a token are contiguous."""
    sizes = ((queries, 1), (keys, 2), (keys, 3))
    q, k, v = (
        randn(2, count, heads * head_dim, seed=seed).bfloat16().unflatten(-1, (heads, -1)).transpose(1, 2)
        for count, seed in sizes
    )
    return q, k, v


@pytest.mark.parametrize("queries, keys", [(16, 16), (70, 33), (33, 200)])
@pytest.mark.parametrize("max_logit_bytes", [1 << 11, 1 << 14, 1 << 22], ids=["some queries", "some heads", "all"])
def test_attend_is_attention_for_every_slice_size(
    queries: int, keys: int, max_logit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "MAX_LOGIT_BYTES", max_logit_bytes)
    q, k, v = inputs(queries, keys)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(cpu_attention.attend(q, k, v), exact) <= 0.004
    assert relative_error(cpu_attention.attend(q, k, v, bf16_logits=True), exact) <= 0.008


def test_its_error_is_at_most_1_3_times_torchs() -> None:
    q, k, v = inputs(160, 160)
    q = 8 * q  # logits as large as in trained models
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error, torch_error = (
        relative_error(cpu_attention.attend(q, k, v), exact),
        relative_error(F.scaled_dot_product_attention(q, k, v), exact),
    )
    assert error <= 1.3 * torch_error


@pytest.mark.skipif(not has_bf16_units(), reason="this CPU has no units for bfloat16")
def test_is_faster_than_torch_follows_the_measured_limits() -> None:
    q, k, _ = inputs(640, 640)
    wide_heads = inputs(640, 640, head_dim=128)[:2]
    assert cpu_attention.is_faster_than_torch(q, k, None, bf16_logits=False)
    assert cpu_attention.is_faster_than_torch(*wide_heads, None, bf16_logits=True)
    assert not cpu_attention.is_faster_than_torch(*wide_heads, None, bf16_logits=False)
    assert not cpu_attention.is_faster_than_torch(q[:, :, :100], k[:, :, :100], None, bf16_logits=True)
    assert not cpu_attention.is_faster_than_torch(q, k, torch.zeros(2, 1, 1, 640), bf16_logits=True)
    assert not cpu_attention.is_faster_than_torch(q.float(), k.float(), None, bf16_logits=True)
    with mode.override(mode.REFERENCE):
        assert not cpu_attention.is_faster_than_torch(q, k, None, bf16_logits=True)


def test_inputs_with_gradients_are_left_to_torch() -> None:
    q, k, _ = inputs(640, 640)
    assert not cpu_attention.is_faster_than_torch(q.requires_grad_(), k, None, bf16_logits=False)
