"""Kernels: each operation, with this model's shapes, against its definition on this device, row by row.

The definitions are in `kernels.reference` and computed in float32. `kernels.trial` compares a kernel once with them, at
the end of its output; a kernel that is wrong elsewhere is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kadr.kernels import attention, fused, reference
from kadr.selftest import figures
from kadr.selftest.result import Check, at_most
from kadr.selftest.subject import NOISE, Subject

# Largest relative error of a row. Rounding to bfloat16 gives 0.004 per operation, and definitions make up to five.
MAX_KERNEL_ERRORS = {torch.float32: 1e-3, torch.bfloat16: 0.03}
# 8-bit codes are off by half a step: in int8 by 0.004 of the largest of a row, which is 3 to 4 times its rms; in fp8 by
# 1/32 of the value.
MAX_CODE_ERRORS = {torch.int8: 0.02, torch.float8_e4m3fn: 0.05}
MAX_ROUNDED_ERROR = 0.05
TEXT_TOKENS, MASKED_TOKENS = 64, 20


def check_kernels(subject: Subject) -> Iterator[Check]:
    """Compares fused operations and attention with their definitions, on random numbers: no weight is read."""
    dtype = subject.spec.dtype
    yield from _check_token_kernels(subject, dtype)
    yield from _check_quantization(subject, dtype)
    yield from _check_image_kernels(subject, dtype)
    yield from _check_attention(subject, dtype)


def _draw(subject: Subject, name: str, *shape: int) -> Tensor:
    return NOISE.draw(name, shape).to(subject.device)


def compare_rows(name: str, actual: Tensor, expected: Tensor, limit: float) -> Check:
    """Returns the check of the row, along the last axis, with the largest relative error."""
    error, row = figures.worst_row(actual.float().cpu(), expected.float().cpu())
    return at_most(f"{name}: error of its worst row", error, limit, f"row {row}")


def _check_token_kernels(subject: Subject, dtype: torch.dtype) -> Iterator[Check]:
    width, count = subject.spec.transformer_config.width, subject.grid.num_tokens
    x, branch = (_draw(subject, name, 1, count, width).to(dtype) for name in ("x", "branch"))
    scale, shift, gate = (0.2 * _draw(subject, name, 1, 1, width).to(dtype) for name in ("scale", "shift", "gate"))
    weight = 1 + 0.1 * _draw(subject, "weight", width).to(dtype)
    angle = _draw(subject, "angle", 1, count, width // 2)
    rotation = torch.stack([angle.cos(), angle.sin()], dim=-1)
    cases: dict[str, tuple[Tensor, ...]] = {
        "norm_modulate": (x, scale, shift),
        "gate_residual": (x, gate, branch),
        "gate_residual_norm_modulate": (x, gate, branch, scale, shift),
        "norm_rope": (x, weight, rotation),
    }
    for name, arguments in cases.items():
        actual = getattr(fused, name)(*arguments)
        expected = getattr(reference, name)(*(tensor.float() for tensor in arguments))
        yield compare_rows(name, _joined(actual), _joined(expected), MAX_KERNEL_ERRORS[dtype])


def _joined(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Returns the rows of all outputs, one below the other."""
    tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
    return torch.cat([tensor.flatten(0, -2) for tensor in tensors])


def _check_quantization(subject: Subject, dtype: torch.dtype) -> Iterator[Check]:
    width, count = subject.spec.transformer_config.width, subject.grid.num_tokens
    x = _draw(subject, "rows", count, width).to(dtype)
    code_dtypes = [torch.int8, *([torch.float8_e4m3fn] if subject.device.type != "mps" else [])]
    for code_dtype in code_dtypes:
        name = str(code_dtype).removeprefix("torch.")
        codes, scales = fused.quantize_rows(x, code_dtype)
        yield compare_rows(f"quantize_rows to {name}", codes.float() * scales, x, MAX_CODE_ERRORS[code_dtype])
        codes, scales = fused.gelu_quantize(x, code_dtype)
        activated = torch.nn.functional.gelu(x.float(), approximate="tanh")
        yield compare_rows(f"gelu_quantize to {name}", codes.float() * scales, activated, MAX_CODE_ERRORS[code_dtype])
    sums = (1000 * _draw(subject, "sums", count, width)).round().to(torch.int32)
    row_scales, column_scales = (
        _draw(subject, name, *shape).abs() for name, shape in (("r", (count, 1)), ("c", (width,)))
    )
    bias = _draw(subject, "bias", width).to(dtype)
    expected = reference.rescale(sums, row_scales, column_scales, bias.float(), torch.float32)
    actual = fused.rescale(sums, row_scales, column_scales, bias, dtype)
    yield compare_rows("rescale", actual, expected, MAX_KERNEL_ERRORS[dtype])


def _check_image_kernels(subject: Subject, dtype: torch.dtype) -> Iterator[Check]:
    """Compares the operations of the VAE's residual blocks, position by position."""
    channels = subject.spec.vae_config.latent_channels
    shape = (1, channels, 2, subject.grid.height * 4, subject.grid.width * 4)
    x, skip = (_draw(subject, name, *shape).to(dtype, memory_format=torch.channels_last_3d) for name in ("x", "skip"))
    scale, shift, bias = (0.2 * _draw(subject, name, 1, channels).to(dtype) for name in ("scale", "shift", "bias"))
    pairs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "pixel_norm_modulate_silu": (
            fused.pixel_norm_modulate_silu,
            reference.pixel_norm_modulate_silu,
            (x, scale, shift),
        ),
        "bias_residual": (fused.bias_residual, reference.bias_residual, (x, bias[0], skip)),
    }
    for name, (run, define, arguments) in pairs.items():
        expected = define(*(tensor.float() for tensor in arguments)).movedim(1, -1)
        actual = run(*(tensor.clone() for tensor in arguments)).movedim(1, -1)
        yield compare_rows(name, actual, expected, MAX_KERNEL_ERRORS[dtype])


def _check_attention(subject: Subject, dtype: torch.dtype) -> Iterator[Check]:
    config, count = subject.spec.transformer_config, subject.grid.num_tokens
    draw = partial(_draw, subject)
    q = (draw("q", 1, config.num_heads, count, config.head_dim) * config.head_dim**-0.5).to(dtype)
    limits = MAX_KERNEL_ERRORS[dtype], MAX_ROUNDED_ERROR if dtype == torch.bfloat16 else MAX_KERNEL_ERRORS[dtype]
    bias = torch.zeros(1, 1, 1, TEXT_TOKENS, device=subject.device, dtype=dtype)
    bias[..., -MASKED_TOKENS:] = -10000.0
    for name, length, mask in (("self-attention", count, None), ("cross-attention", TEXT_TOKENS, bias)):
        k, v = (draw(part, 1, config.num_heads, length, config.head_dim).to(dtype) for part in ("k", "v"))
        logits = q.float() @ k.float().transpose(-1, -2)
        weights = (logits if mask is None else logits + mask.float()).softmax(-1)
        expected = weights @ v.float()
        for may_round in (False, True):
            actual = attention.attend(q, k, v, mask, may_round=may_round)
            yield compare_rows(f"{name}{' beside 8-bit products' * may_round}", actual, expected, limits[may_round])
