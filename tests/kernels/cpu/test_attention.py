"""CPU attention by two products of oneDNN is as exact as torch's, for any length, mask and spread of logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.errors import Cancelled
from kadr.kernels import mode
from kadr.kernels.cpu import attention as cpu_attention
from kadr.kernels.matmul import has_bf16_units
from tests.oracles import randn, relative_error

MAX_ERROR_RATIO = 1.2  # to torch's own error in bfloat16


def inputs(queries: int, keys: int, heads: int = 4, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v in a transformer's memory order: the heads of a token are contiguous. q is scaled."""
    sizes = ((queries, 1, head_dim**-0.5), (keys, 2, 1.0), (keys, 3, 1.0))
    q, k, v = (
        (factor * randn(2, count, heads * head_dim, seed=seed)).bfloat16().unflatten(-1, (heads, -1)).transpose(1, 2)
        for count, seed, factor in sizes
    )
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    mask = None if bias is None else bias.double()
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=1.0)


def torch_error(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> float:
    return relative_error(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0), exact(q, k, v, bias))


def padding_mask(*lengths: int, keys: int) -> Tensor:
    """Returns the bias (B, 1, 1, M) of texts of those lengths."""
    is_padding = torch.arange(keys) >= torch.tensor(lengths)[:, None]
    return (is_padding * -10_000.0).bfloat16()[:, None, None]


@pytest.mark.parametrize("queries, keys", [(16, 16), (70, 33), (33, 200), (1, 5)])
@pytest.mark.parametrize("weight_bytes", [1 << 11, 1 << 14, 1 << 22], ids=["many slices", "some", "one"])
def test_attend_is_attention_for_every_slice_size(
    queries: int, keys: int, weight_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "WEIGHT_BYTES", weight_bytes)
    q, k, v = inputs(queries, keys)
    expected = exact(q, k, v)
    assert relative_error(cpu_attention.attend(q, k, v), expected) <= 0.003
    assert relative_error(cpu_attention.attend_rounded(q, k, v), expected) <= 0.004


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("spread", [0.1, 1, 8], ids=["flat", "random", "as in trained models"])
def test_its_error_is_at_most_1_2_times_torchs(head_dim: int, spread: float) -> None:
    q, k, v = inputs(320, 320, head_dim=head_dim)
    q = spread * q
    error = relative_error(cpu_attention.attend(q, k, v), exact(q, k, v))
    assert error <= MAX_ERROR_RATIO * torch_error(q, k, v)


def test_masked_keys_take_no_part() -> None:
    q, k, v = inputs(64, 100)
    bias = padding_mask(100, 37, keys=100)
    error = relative_error(cpu_attention.attend(q, k, v, bias), exact(q, k, v, bias))
    assert error <= MAX_ERROR_RATIO * torch_error(q, k, v, bias)
    alone = cpu_attention.attend(*(tensor[1:, :, :37] if tensor is not q else q[1:] for tensor in (q, k, v)))
    assert relative_error(cpu_attention.attend(q, k, v, bias)[1:], alone) <= 0.003


def test_a_bias_that_is_no_mask_is_refused() -> None:
    q, k, v = inputs(64, 32)
    for bias in (torch.full((2, 1, 1, 32), 0.5).bfloat16(), padding_mask(32, 0, keys=32)):
        assert not cpu_attention.is_supported(q, k, v, bias)
        with pytest.raises(ValueError, match="not a mask"):
            cpu_attention.attend(q, k, v, bias)


@pytest.mark.parametrize("masked", [False, True])
def test_logits_far_below_their_bound_are_exact_too(masked: bool) -> None:
    """One key is as long as a hundred others, and all queries point away from it: the bound exceeds all logits."""
    q, k, v = inputs(64, 64)
    k = k.clone()
    k[:, :, 0] = -1000 * q.mean(2)
    bias = padding_mask(64, 20, keys=64) if masked else None
    assert float(cpu_attention._bound_logits(q[0], k[0]).max()) > 90
    error = relative_error(cpu_attention.attend(q, k, v, bias), exact(q, k, v, bias))
    assert error <= MAX_ERROR_RATIO * torch_error(q, k, v, bias)


def test_queries_of_any_length_in_one_call() -> None:
    q, k, v = inputs(64, 64)
    q = q * torch.logspace(-3, 3, 64)[:, None].bfloat16()
    output, expected = cpu_attention.attend(q, k, v), exact(q, k, v)
    for row in range(64):
        assert relative_error(output[:, :, row], expected[:, :, row]) <= 0.006


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_give_what_torch_gives(value: float) -> None:
    q, k, v = inputs(16, 16)
    k[0, 1, 3, 5] = value
    output, expected = cpu_attention.attend(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output[0, 1].nan_to_num(), expected[0, 1].nan_to_num())
    assert output[1].isfinite().all()


def test_cancelling_stops_it_between_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise Cancelled("stop")

    monkeypatch.setattr(cpu_attention, "check_cancelled", stop)
    with pytest.raises(Cancelled):
        cpu_attention.attend(*inputs(16, 16))


@pytest.mark.skipif(not has_bf16_units(), reason="this CPU has no units for bfloat16")
def test_it_is_for_bfloat16_on_cpus_with_units_for_it() -> None:
    q, k, v = inputs(16, 16)
    assert cpu_attention.is_supported(q, k, v, None)
    assert not cpu_attention.is_supported(q.float(), k.float(), v.float(), None)
    with mode.override(mode.REFERENCE):
        assert not cpu_attention.is_supported(q, k, v, None)
