"""On a GPU: kernels at the sizes of the released models, what is chosen there, and graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import (
    MODEL_SHAPES,
    KernelCase,
    ModelShape,
    cases,
    float32_reference,
    largest_error,
    median_seconds,
    output_tensors,
    supported_eight_bit_dtypes,
)
from kadr.kernels import attention, fp8, fused, reference, trial
from kadr.kernels.cuda_graphs import GraphedCallable

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing tried yet, and a warning (of a kernel that is left alone, say) is an error."""
    trial.reset()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("error", module="kadr")
        yield


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def in_eight_bits(case: KernelCase) -> bool:
    return "quantize" in case.name and case.name != "dequantize"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", MODEL_SHAPES, ids=lambda size: size.name)
def test_kernels_are_as_exact_as_their_definitions(size: ModelShape, dtype: torch.dtype) -> None:
    """Against the definition in fp32. Codes of 8 bits may fall to the other side where a number lies between two."""
    for case in cases(size, "cuda", dtype, supported_eight_bit_dtypes()):
        right = float32_reference(case)
        plain = largest_error(output_tensors(case.reference(*case.arguments)), right)
        made = largest_error(output_tensors(case.kernel(*case.arguments)), right)
        assert made <= max(1.1 * plain, 5e-3 if in_eight_bits(case) else 2e-6), (case.name, case.note)


@pytest.mark.parametrize("size", MODEL_SHAPES, ids=lambda size: size.name)
def test_the_dispatch_takes_every_kernel_and_each_is_faster(size: ModelShape) -> None:
    """Prints by how much: pytest -s. That a kernel should be slower than a dozen passes would be a fault in it."""
    slower = []
    for case in cases(size, "cuda", eight_bit_dtypes=supported_eight_bit_dtypes()):
        getattr(fused, case.name)(*case.arguments)
        plain, fast = (median_seconds(run, *case.arguments) for run in (case.reference, getattr(fused, case.name)))
        print(f"{size.name} {case.name} {case.note}: {plain * 1e6:.1f} / {fast * 1e6:.1f} µs = {plain / fast:.2f}")
        if fast > 1.1 * plain:
            slower.append(case.name)
    assert all(trial._verdicts.values())
    assert not slower


def test_numbers_beyond_two_to_the_31st_have_their_places() -> None:
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB")
    shape = (1, 128, 65, 512, 512)
    clip = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last_3d)
    clip.copy_(drawn(1, 128, 1, 512, 512).expand(shape))
    assert clip.numel() > 2**31
    end = clip[:, :, -1:].contiguous(memory_format=torch.channels_last_3d)
    made = fused.pixel_norm_modulate_silu(clip)[:, :, -1:]
    torch.testing.assert_close(made, reference.pixel_norm_modulate_silu(end), rtol=0.02, atol=0.02)
    added = fused.bias_residual(clip, None, clip)[:, :, -1:]
    assert torch.equal(added, 2 * end)
    tokens = clip.permute(0, 2, 3, 4, 1).reshape(1, -1, 4096)
    entered = fused.norm_modulate(tokens, tokens[:, :1], tokens[:, :1])
    end = tokens[:, -64:]
    right = reference.norm_modulate(end, tokens[:, :1], tokens[:, :1])
    torch.testing.assert_close(entered[:, -64:], right, rtol=0.02, atol=0.05)


def test_a_row_that_holds_no_number_shows_it() -> None:
    for kind in supported_eight_bit_dtypes():
        for odd in (torch.nan, torch.inf, -torch.inf):
            x = drawn(4, 2048)
            x[2, 7] = odd
            codes, scale = fused.quantize_rows(x, kind)
            codes, scale = fused.quantize_rows(x, kind)  # the first may be the definition's
            assert (codes.float() * scale)[[0, 1, 3]].isfinite().all()
            assert not scale[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys, biased", [(1500, False), (100, False), (100, True)])
@pytest.mark.parametrize("width", [64, 128])
def test_attention_is_right_whoever_computes_it(width: int, keys: int, biased: bool, dtype: torch.dtype) -> None:
    q, k, v = (
        drawn(2, length, 32, width, seed=seed, dtype=dtype).transpose(1, 2)
        for seed, length in enumerate((1500, keys, keys))
    )
    bias = torch.zeros(2, 1, 1, keys, dtype=dtype, device="cuda") if biased else None
    if bias is not None:
        bias[:, ..., keys // 2 :] = -10000.0
    for _ in range(2):
        made = attention.attend(q, k, v, bias)
    right = F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), None if bias is None else bias.float())
    assert float((made.float() - right).norm() / right.norm()) < {torch.float32: 1e-4}.get(dtype, 0.01)
    print(attention.autotuner_for(q.device).outcomes[attention.Bucket.from_tensors(q, k, bias)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_eight_bit_floats_use_the_chip(dtype: torch.dtype) -> None:
    if not fp8.has_fp8_units(DEVICE):
        pytest.skip("needs Ada or newer")
    assert fp8.select_matmul(DEVICE, dtype) != fp8.FP32_MATMUL
    weight, scale = reference.quantize_rows(drawn(8192, 2048, seed=1, dtype=dtype), fp8.E4M3)
    x, bias = drawn(1, 1000, 2048, dtype=dtype), drawn(8192, seed=2, dtype=dtype)
    made = fp8.linear(x, weight, scale.flatten(), bias)
    right = F.linear(x.float(), drawn(8192, 2048, seed=1, dtype=dtype).float(), bias.float())
    assert made.shape == (1, 1000, 8192)
    assert float((made.float() - right).norm() / right.norm()) < 0.045


def test_a_graph_replays_kernels_attention_and_products() -> None:
    weights = [drawn(2048, 2048, seed=seed) / 45 for seed in range(4)]

    def layer(x: Tensor, bends: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shift, scale, gate = bends
        q, k, v = (F.linear(fused.norm_modulate(x, scale, shift), weight) for weight in weights[:3])
        q, k, v = (t.unflatten(-1, (32, -1)).transpose(1, 2) for t in (q, k, v))
        attended = attention.attend(q, k, v).transpose(1, 2).flatten(2)
        return fused.gate_residual_norm_modulate(x, gate, F.linear(attended, weights[3]), scale, shift)

    graphed, bends = GraphedCallable(layer), tuple(drawn(1, 1, 3, 2048, seed=9).unbind(-2))
    for seed in range(6):
        for tokens in (640, 384):
            x = drawn(1, tokens, 2048, seed=seed)
            for made, right in zip(graphed(x, bends), layer(x, bends), strict=True):
                torch.testing.assert_close(made, right, rtol=0.02, atol=0.02)
    assert graphed.replay_count == 10
    x = drawn(1, 384, 2048)
    plain, fast = median_seconds(layer, x, bends), median_seconds(graphed, x, bends)
    print(f"graph of a layer's half, 384 tokens: {plain * 1e6:.1f} / {fast * 1e6:.1f} µs = {plain / fast:.2f}")
