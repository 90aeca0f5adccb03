"""Speedup of each kernel over its definition: `python -m benchmarks.kernels`.

Every kernel runs beside its definition at the sizes of the released models, with cold caches, and so do the attention
candidates and the 8-bit matmuls; on a CPU the attention candidates alone, beside what torch picks. Errors are
relative, against the definition in float32. Prints a table, and the same as one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.bench.machine import describe_machine
from kadr.bench.runner import clock_for
from kadr.kernels import attention, dequant, fp8, fused, int8, reference
from kadr.kernels.autotuner import TORCH_SDPA, AttentionAutotuner, relative_error, torch_sdpa
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.memory.device import pick_device

WARM_UPS = 3
TIMED_RUNS = {"cuda": 15, "cpu": 5}
CPU_TOKENS = (2560, 6144)
FLUSH_BYTES = 256 << 20  # written before each run; more than any cache holds
EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn)
COLUMNS = (
    "operation",
    "size",
    "reference, µs",
    "kernel, µs",
    "speedup",
    "GB/s, TFLOP/s",
    "error, reference",
    "error, kernel",
)


@dataclass(frozen=True)
class ModelShape:
    """Tensor sizes of one model.

    Args:
        tokens: of a video of 768x512x121 or 1216x704x121.
        decoder_stages: a slice of a video in the first and the last stage of the VAE's decoder, as channels, frames,
            rows, columns.
        weight_rows: rows of a weight in GGML's blocks.
        text_length: positions of the prompt embeddings.
    """

    name: str
    tokens: int
    width: int
    heads: int
    decoder_stages: tuple[tuple[int, int, int, int], ...]
    weight_rows: int
    text_length: int = 256


MODEL_SHAPES = (
    ModelShape("2B", 6144, 2048, 32, ((512, 4, 32, 48), (128, 16, 128, 192)), 8192),
    ModelShape("13B", 13376, 4096, 32, ((512, 4, 44, 76), (128, 16, 176, 304)), 16384),
)


@dataclass(frozen=True)
class KernelCase:
    """One operation with its arguments."""

    name: str
    module: str
    arguments: tuple[Any, ...]
    note: str = ""

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(dequant if self.module == "ggml" else reference, self.name)

    @property
    def kernel(self) -> Callable[..., Any]:
        return getattr(import_module(f"kadr.kernels.triton.{self.module}"), self.name)


@dataclass(frozen=True)
class KernelResult:
    """One row of the table. `rate` is in GB/s, or for matmuls in TFLOP/s."""

    name: str
    size: str
    reference_seconds: float
    kernel_seconds: float
    rate: float
    reference_error: float
    kernel_error: float


def cases(
    size: ModelShape,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    eight_bit_dtypes: tuple[torch.dtype, ...] = EIGHT_BIT_DTYPES,
) -> Iterator[KernelCase]:
    """Yields every kernel at one size, on random values: zeros would be faster than any video."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    width = size.width
    x, branch = randn(1, size.tokens, 3 * width)[..., :width], randn(1, size.tokens, width)
    shift, scale, gate = randn(1, 1, 6, width).unbind(-2)[:3]
    yield KernelCase("norm_modulate", "adaln", (x, scale, shift))
    yield KernelCase("gate_residual", "adaln", (branch, gate, x))
    yield KernelCase("gate_residual_norm_modulate", "adaln", (branch, gate, x, scale, shift))
    angles = branch.float().unflatten(-1, (-1, 2))[..., 0]
    yield KernelCase("norm_rope", "rope", (x, shift[0, 0], torch.stack((angles.cos(), angles.sin()), -1)))
    hidden = randn(size.tokens, 4 * width)
    for code_dtype in eight_bit_dtypes:
        note = str(code_dtype).removeprefix("torch.")
        yield KernelCase("norm_modulate_quantize", "adaln", (x, scale, shift, code_dtype), note)
        yield KernelCase(
            "gate_residual_norm_modulate_quantize", "adaln", (branch, gate, x, scale, shift, code_dtype), note
        )
        yield KernelCase("quantize_rows", "quantization", (x[0], code_dtype), note)
        yield KernelCase("gelu_quantize", "quantization", (hidden, code_dtype), note)
    sums, rows, columns = (hidden * 1000).int(), randn(size.tokens, 1).float().abs(), hidden[0].float().abs()
    yield KernelCase("rescale", "quantization", (sums, rows, columns, hidden[1], dtype))
    for stage in size.decoder_stages:
        video = randn(1, *stage).contiguous(memory_format=torch.channels_last_3d)
        scale_shift = randn(1, 4, stage[0]).unbind(1)[:2]
        yield KernelCase("pixel_norm_modulate_silu", "vae", (video, *scale_shift), f"{stage[0]} channels")
        yield KernelCase("bias_residual", "vae", (video, scale_shift[0][0], video), f"{stage[0]} channels")
    for name in fused.GGML_KERNEL_TYPES:
        yield KernelCase("dequantize", "ggml", random_ggml_blocks(name, size.weight_rows, width, device, dtype), name)


def random_ggml_blocks(name: str, rows: int, columns: int, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Returns the arguments of `dequantize`: random bytes with finite scales, the type, and an output buffer."""
    ggml_type = GGML_TYPES[name]
    blocks = torch.randint(0, 256, (rows, columns // ggml_type.block_size, ggml_type.type_size), dtype=torch.uint8)
    for start in {"Q8_0": (0,), "Q6_K": (208,), "Q4_K": (0, 2)}[name]:
        blocks[..., start + 1] &= 0x3B  # below 1, and finite
    return blocks.flatten(1).to(device), ggml_type, torch.empty(rows, columns, dtype=dtype, device=device)


def supported_eight_bit_dtypes() -> tuple[torch.dtype, ...]:
    """Returns the 8-bit dtypes that the CUDA device supports."""
    return EIGHT_BIT_DTYPES if fp8.has_fp8_units(torch.device("cuda")) else EIGHT_BIT_DTYPES[:1]


def median_seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Returns the median seconds of some runs on the current CUDA device, each with cold caches."""
    (seconds,) = in_turns(partial(run, *arguments), device=torch.device("cuda"))
    return seconds


def in_turns(*runs: Callable[[], Any], device: torch.device) -> list[float]:
    """Returns the median seconds of each, over rounds in which each runs once, with cold caches."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for run in runs:
        for _ in range(WARM_UPS):
            run()
    clock, seconds = clock_for(device), []
    for _ in range(TIMED_RUNS[device.type]):
        flush.zero_()
        seconds.append([clock(run) for run in runs])
    return [statistics.median(times) for times in zip(*seconds, strict=True)]


def output_tensors(outputs: Any) -> list[Tensor]:
    """Returns the output tensors in fp32; codes times their scales."""
    if isinstance(outputs, Tensor):
        return [outputs.float()]
    if outputs[-2].dtype in EIGHT_BIT_DTYPES:
        return [*(tensor.float() for tensor in outputs[:-2]), outputs[-2].float() * outputs[-1]]
    return [tensor.float() for tensor in outputs]


def to_float32(argument: Any) -> Any:
    """Converts a tensor of 16-bit floats to fp32, and their dtype to torch.float32."""
    narrow_dtypes = (torch.bfloat16, torch.float16)
    if isinstance(argument, Tensor):
        return argument.float() if argument.dtype in narrow_dtypes else argument
    return torch.float32 if argument in narrow_dtypes else argument


def float32_reference(case: KernelCase) -> list[Tensor]:
    """Returns the output of the definition in fp32. Intermediates are not rounded, so codes may differ."""
    return output_tensors(case.reference(*map(to_float32, case.arguments)))


def largest_error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest relative error of the tensors."""
    return max(
        float((actual - correct).norm() / correct.norm()) for actual, correct in zip(outputs, expected, strict=True)
    )


def measure_kernel(case: KernelCase, size: ModelShape) -> KernelResult:
    """Measures a kernel beside its definition."""
    expected, output = float32_reference(case), case.kernel(*case.arguments)
    errors = [largest_error(output_tensors(outputs), expected) for outputs in (case.reference(*case.arguments), output)]
    tensors = [*case.arguments, *(output if isinstance(output, tuple) else (output,))]
    moved_bytes = sum(
        t.numel() * t.element_size() for t in {id(t): t for t in tensors if isinstance(t, Tensor)}.values()
    )
    reference_seconds, kernel_seconds = (median_seconds(run, *case.arguments) for run in (case.reference, case.kernel))
    name = f"{case.name}, {case.note}" if case.note else case.name
    return KernelResult(name, size.name, reference_seconds, kernel_seconds, moved_bytes / kernel_seconds / 1e9, *errors)


def measure_attention(
    size: ModelShape, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Iterator[KernelResult]:
    """Measures self-attention, and cross-attention with a bias and without, beside what torch picks."""
    for keys, has_bias in ((size.tokens, False), (size.text_length, False), (size.text_length, True)):
        shapes = ((1, length, size.heads, size.width // size.heads) for length in (size.tokens, keys, keys))
        q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes)
        arguments = (q / q.shape[-1] ** 0.5, k, v, torch.zeros_like(k[:, :1, None, :, 0]) if has_bias else None)
        for may_round in (False, True)[: 1 + (device.type == "cpu")]:
            names = f"{keys} keys{', bias' if has_bias else ''}{', may round' if may_round else ''}"
            yield from measure_candidates(size, names, attention.autotuner_for(device, may_round), arguments)


def measure_candidates(
    size: ModelShape, names: str, autotuner: AttentionAutotuner, arguments: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> Iterator[KernelResult]:
    """Measures the candidates that an autotuner accepts; prints why it rejects the others."""
    q, k = arguments[:2]
    for candidate in autotuner.candidates:
        outcome = autotuner.try_candidate(candidate, *arguments)
        if isinstance(outcome, str):
            print(f"{candidate.name}, {size.name}, {names}: {outcome}", file=sys.stderr)
        elif candidate is not TORCH_SDPA:
            runs = torch_sdpa, candidate.run
            seconds = in_turns(*(partial(run, *arguments) for run in runs), device=q.device)
            rate = 4 * q.numel() * k.shape[2] / seconds[1] / 1e12
            errors = [relative_error(run(*arguments), *arguments) for run in runs]
            dtype = str(q.dtype).removeprefix("torch.")
            yield KernelResult(f"attention by {candidate.name}, {names}, {dtype}", size.name, *seconds, rate, *errors)


def measure_matmul(size: ModelShape) -> Iterator[KernelResult]:
    """Measures the up projection of the feed-forward in 8 bits, beside bfloat16. Its error is by design."""
    shapes = ((size.tokens, size.width), (4 * size.width, size.width))
    x, weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    expected, reference_seconds = [x.float() @ weight.float().t()], median_seconds(F.linear, x, weight)
    reference_error, flops = (
        largest_error([F.linear(x, weight).float()], expected),
        2 * expected[0].numel() * size.width,
    )
    for run, code_dtype in ((int8.linear, torch.int8), (fp8.linear, torch.float8_e4m3fn)):
        if code_dtype in supported_eight_bit_dtypes():
            codes, scale = reference.quantize_rows(weight, code_dtype)
            arguments = (x, codes, scale.flatten(), None)
            seconds, error = median_seconds(run, *arguments), largest_error([run(*arguments).float()], expected)
            yield KernelResult(
                f"linear in {code_dtype}",
                size.name,
                reference_seconds,
                seconds,
                flops / seconds / 1e12,
                reference_error,
                error,
            )


def markdown_table(rows: list[KernelResult]) -> str:
    """Formats the results as Markdown."""
    lines: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        seconds = (
            f"{row.reference_seconds * 1e6:.1f}",
            f"{row.kernel_seconds * 1e6:.1f}",
            f"{row.reference_seconds / row.kernel_seconds:.2f}",
            f"{row.rate:.0f}",
        )
        lines.append((row.name, row.size, *seconds, f"{row.reference_error:.1e}", f"{row.kernel_error:.1e}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(size: ModelShape, device: torch.device) -> Iterator[KernelResult]:
    """Measures all there is for a device at one size: on a CPU the kernels are those of attention."""
    if device.type == "cpu":
        for tokens, dtype in itertools.product(CPU_TOKENS, (torch.bfloat16, torch.float32)):
            yield from measure_attention(
                replace(size, tokens=tokens, name=f"{size.name}, {tokens} tokens"), device, dtype
            )
        return
    for case in cases(size, "cuda", eight_bit_dtypes=supported_eight_bit_dtypes()):
        yield measure_kernel(case, size)
    yield from measure_attention(size, device)
    yield from measure_matmul(size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--size", choices=[size.name for size in MODEL_SHAPES], action="append", help="default: all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    sizes = [size for size in MODEL_SHAPES if size.name in (options.size or [size.name])]
    with torch.inference_mode():
        rows = [row for size in sizes for row in measure(size, device)]
    print(markdown_table(rows))
    print(json.dumps({**describe_machine(device), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
