"""Attention by large products: as near to exact attention as torch's own, or a little further where asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import mode
from kadr.kernels.cpu import attention as cpu_attention
from kadr.kernels.matmul import has_bf16_units
from tests.oracles import randn, relative_error


def inputs(queries: int, keys: int, heads: int = 4, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """As a transformer has them: the heads lie next to each other in every token."""
    sizes = ((queries, 1), (keys, 2), (keys, 3))
    q, k, v = (
        randn(2, count, heads * width, seed=seed).bfloat16().unflatten(-1, (heads, -1)).transpose(1, 2)
        for count, seed in sizes
    )
    return q, k, v


@pytest.mark.parametrize("queries, keys", [(16, 16), (70, 33), (33, 200)])
@pytest.mark.parametrize("cached", [1 << 11, 1 << 14, 1 << 22], ids=["some queries", "some heads", "all"])
def test_it_is_attention_however_it_is_cut(
    queries: int, keys: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "MAX_LOGIT_BYTES", cached)
    q, k, v = inputs(queries, keys)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(cpu_attention.attend(q, k, v), exact) <= 0.004
    assert relative_error(cpu_attention.attend(q, k, v, bf16_logits=True), exact) <= 0.008


def test_its_error_is_about_that_of_torch() -> None:
    q, k, v = inputs(160, 160)
    q = 8 * q  # logits as far from 0 as trained models have them
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    own, theirs = (
        relative_error(cpu_attention.attend(q, k, v), exact),
        relative_error(F.scaled_dot_product_attention(q, k, v), exact),
    )
    assert own <= 1.3 * theirs


@pytest.mark.skipif(not has_bf16_units(), reason="this CPU has no units for bfloat16")
def test_it_is_taken_where_it_was_measured_to_be_ahead() -> None:
    q, k, _ = inputs(640, 640)
    wide = inputs(640, 640, width=128)[:2]
    assert cpu_attention.is_faster_than_torch(q, k, None, bf16_logits=False)
    assert cpu_attention.is_faster_than_torch(*wide, None, bf16_logits=True)
    assert not cpu_attention.is_faster_than_torch(*wide, None, bf16_logits=False)
    assert not cpu_attention.is_faster_than_torch(q[:, :, :100], k[:, :, :100], None, bf16_logits=True)
    assert not cpu_attention.is_faster_than_torch(q, k, torch.zeros(2, 1, 1, 640), bf16_logits=True)
    assert not cpu_attention.is_faster_than_torch(q.float(), k.float(), None, bf16_logits=True)
    with mode.override(mode.REFERENCE):
        assert not cpu_attention.is_faster_than_torch(q, k, None, bf16_logits=True)


def test_it_leaves_learning_to_torch() -> None:
    q, k, _ = inputs(640, 640)
    assert not cpu_attention.is_faster_than_torch(q.requires_grad_(), k, None, bf16_logits=False)
