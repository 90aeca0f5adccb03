"""On a GPU: kernels at the sizes of the released models, the matmuls and attention selected, and CUDA graphs."""

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
from kadr.kernels.autotuner import Bucket
from kadr.kernels.cuda.graphs import GraphedCallable

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def reset_verdicts_and_raise_warnings() -> Iterator[None]:
    """Clears all verdicts, and turns warnings (of a rejected kernel, say) into errors."""
    trial.reset()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("error", module="kadr")
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def is_quantized(case: KernelCase) -> bool:
    return "quantize" in case.name and case.name != "dequantize"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", MODEL_SHAPES, ids=lambda size: size.name)
def test_kernels_are_as_exact_as_their_definitions(size: ModelShape, dtype: torch.dtype) -> None:
    """Against the definition in fp32. 8-bit codes may differ by one for values between two codes."""
    for case in cases(size, "cuda", dtype, supported_eight_bit_dtypes()):
        expected = float32_reference(case)
        reference_error = largest_error(output_tensors(case.reference(*case.arguments)), expected)
        output = largest_error(output_tensors(case.kernel(*case.arguments)), expected)
        assert output <= max(1.1 * reference_error, 5e-3 if is_quantized(case) else 2e-6), (case.name, case.note)


@pytest.mark.parametrize("size", MODEL_SHAPES, ids=lambda size: size.name)
def test_fused_accepts_every_kernel_and_each_is_faster(size: ModelShape) -> None:
    """Prints the speedups with pytest -s."""
    slower = []
    for case in cases(size, "cuda", eight_bit_dtypes=supported_eight_bit_dtypes()):
        getattr(fused, case.name)(*case.arguments)
        reference_seconds, kernel_seconds = (
            median_seconds(run, *case.arguments) for run in (case.reference, getattr(fused, case.name))
        )
        speedup = (
            f"{reference_seconds * 1e6:.1f} / {kernel_seconds * 1e6:.1f} µs = {reference_seconds / kernel_seconds:.2f}"
        )
        print(f"{size.name} {case.name} {case.note}: {speedup}")
        if kernel_seconds > 1.1 * reference_seconds:
            slower.append(case.name)
    assert all(trial._verdicts.values())
    assert not slower


def test_offsets_beyond_2_to_the_31st_are_correct() -> None:
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB")
    shape = (1, 128, 65, 512, 512)
    video = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last_3d)
    video.copy_(randn(1, 128, 1, 512, 512).expand(shape))
    assert video.numel() > 2**31
    end = video[:, :, -1:].contiguous(memory_format=torch.channels_last_3d)
    output = fused.pixel_norm_modulate_silu(video)[:, :, -1:]
    torch.testing.assert_close(output, reference.pixel_norm_modulate_silu(end), rtol=0.02, atol=0.02)
    added = fused.bias_residual(video, None, video)[:, :, -1:]
    assert torch.equal(added, 2 * end)
    tokens = video.permute(0, 2, 3, 4, 1).reshape(1, -1, 4096)
    modulated = fused.norm_modulate(tokens, tokens[:, :1], tokens[:, :1])
    end = tokens[:, -64:]
    expected = reference.norm_modulate(end, tokens[:, :1], tokens[:, :1])
    torch.testing.assert_close(modulated[:, -64:], expected, rtol=0.02, atol=0.05)


def test_nan_and_inf_show_in_the_scale_of_their_row_only() -> None:
    for code_dtype in supported_eight_bit_dtypes():
        for value in (torch.nan, torch.inf, -torch.inf):
            x = randn(4, 2048)
            x[2, 7] = value
            codes, scale = fused.quantize_rows(x, code_dtype)
            codes, scale = fused.quantize_rows(x, code_dtype)  # the first call may return the definition's
            assert (codes.float() * scale)[[0, 1, 3]].isfinite().all()
            assert not scale[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys, has_bias", [(1500, False), (100, False), (100, True)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_is_correct_for_every_shape_and_dtype(
    head_dim: int, keys: int, has_bias: bool, dtype: torch.dtype
) -> None:
    q, k, v = (
        randn(2, length, 32, head_dim, seed=seed, dtype=dtype).transpose(1, 2)
        for seed, length in enumerate((1500, keys, keys))
    )
    bias = torch.zeros(2, 1, 1, keys, dtype=dtype, device="cuda") if has_bias else None
    if bias is not None:
        bias[:, ..., keys // 2 :] = -10000.0
    for _ in range(2):
        output = attention.attend(q, k, v, bias)
    expected = F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), None if bias is None else bias.float())
    assert float((output.float() - expected).norm() / expected.norm()) < {torch.float32: 1e-4}.get(dtype, 0.01)
    print(attention.autotuner_for(q.device).outcomes[Bucket.from_tensors(q, k, bias)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_matmuls_use_the_gpus_fp8_units(dtype: torch.dtype) -> None:
    if not fp8.has_fp8_units(DEVICE):
        pytest.skip("needs Ada or newer")
    assert fp8.select_matmul(DEVICE, dtype) != fp8.FP32_MATMUL
    weight, scale = reference.quantize_rows(randn(8192, 2048, seed=1, dtype=dtype), fp8.E4M3)
    x, bias = randn(1, 1000, 2048, dtype=dtype), randn(8192, seed=2, dtype=dtype)
    output = fp8.linear(x, weight, scale.flatten(), bias)
    expected = F.linear(x.float(), randn(8192, 2048, seed=1, dtype=dtype).float(), bias.float())
    assert output.shape == (1, 1000, 8192)
    assert float((output.float() - expected).norm() / expected.norm()) < 0.045


def test_a_cuda_graph_replays_kernels_attention_and_matmuls() -> None:
    weights = [randn(2048, 2048, seed=seed) / 45 for seed in range(4)]

    def layer(x: Tensor, adaln: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shift, scale, gate = adaln
        q, k, v = (F.linear(fused.norm_modulate(x, scale, shift), weight) for weight in weights[:3])
        q, k, v = (t.unflatten(-1, (32, -1)).transpose(1, 2) for t in (q, k, v))
        attended = attention.attend(q, k, v).transpose(1, 2).flatten(2)
        return fused.gate_residual_norm_modulate(x, gate, F.linear(attended, weights[3]), scale, shift)

    graphed, adaln = GraphedCallable(layer), tuple(randn(1, 1, 3, 2048, seed=9).unbind(-2))
    for seed in range(6):
        for tokens in (640, 384):
            x = randn(1, tokens, 2048, seed=seed)
            for output, expected in zip(graphed(x, adaln), layer(x, adaln), strict=True):
                torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    assert graphed.replay_count == 10
    x = randn(1, 384, 2048)
    eager_seconds, graph_seconds = median_seconds(layer, x, adaln), median_seconds(graphed, x, adaln)
    speedup = f"{eager_seconds * 1e6:.1f} / {graph_seconds * 1e6:.1f} µs = {eager_seconds / graph_seconds:.2f}"
    print(f"graph of half a block, 384 tokens: {speedup}")
