"""What each kernel saves: `python -m benchmarks.kernels`. Needs a CUDA device.

Every kernel runs beside its definition at the sizes of the released models, with cold caches. So do the ways to compute
attention and products in 8 bits. Errors are relative, against the definition in float32. Prints a table, and the same
as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import attention, dequant, fp8, fused, int8, reference
from kadr.kernels.ggml_types import GGML_TYPES

WARM, RUNS, FLUSH = 3, 15, 256 << 20  # bytes that are written before each run, more than any cache holds
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
HEAD = ("operation", "size", "plain, µs", "fast, µs", "times", "GB/s, TFLOP/s", "error, plain", "error, fast")


@dataclass(frozen=True)
class Size:
    """What the kernels meet in one model.

    Args:
        tokens: of a video, 768x512x121 or 1216x704x121.
        stages: of the VAE's decoder, a slice of a video in its first and its last: channels, frames, rows, columns.
        outputs: rows of a weight in the blocks of GGML.
        text: positions of a prompt.
    """

    name: str
    tokens: int
    width: int
    heads: int
    stages: tuple[tuple[int, int, int, int], ...]
    outputs: int
    text: int = 256


SIZES = (
    Size("2B", 6144, 2048, 32, ((512, 4, 32, 48), (128, 16, 128, 192)), 8192),
    Size("13B", 13376, 4096, 32, ((512, 4, 44, 76), (128, 16, 176, 304)), 16384),
)


@dataclass(frozen=True)
class Case:
    """One operation with what it is given."""

    name: str
    family: str
    arguments: tuple[Any, ...]
    note: str = ""

    @property
    def definition(self) -> Callable[..., Any]:
        return getattr(dequant if self.family == "ggml" else reference, self.name)

    @property
    def kernel(self) -> Callable[..., Any]:
        return getattr(import_module(f"kadr.kernels.triton.{self.family}"), self.name)


@dataclass(frozen=True)
class Row:
    """One line of the table. `plain` and `fast` are seconds; rate is in GB/s or, of products, in TFLOP/s."""

    name: str
    size: str
    plain: float
    fast: float
    rate: float
    plain_error: float
    fast_error: float


def cases(
    size: Size, device: str, dtype: torch.dtype = torch.bfloat16, kinds: tuple[torch.dtype, ...] = EIGHT_BITS
) -> Iterator[Case]:
    """Every kernel at one size, on random numbers: zeros would be faster than any video. kinds: of 8 bits."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    width = size.width
    x, branch = drawn(1, size.tokens, 3 * width)[..., :width], drawn(1, size.tokens, width)
    shift, scale, gate = drawn(1, 1, 6, width).unbind(-2)[:3]
    yield Case("norm_modulate", "adaln", (x, scale, shift))
    yield Case("gate_residual", "adaln", (branch, gate, x))
    yield Case("gate_residual_norm_modulate", "adaln", (branch, gate, x, scale, shift))
    yield Case("norm_rope", "rope", (x, shift[0, 0], branch.cos(), branch.sin()))
    hidden = drawn(size.tokens, 4 * width)
    for kind in kinds:
        note = str(kind).removeprefix("torch.")
        yield Case("norm_modulate_quantize", "adaln", (x, scale, shift, kind), note)
        yield Case("gate_residual_norm_modulate_quantize", "adaln", (branch, gate, x, scale, shift, kind), note)
        yield Case("quantize_rows", "quantization", (x[0], kind), note)
        yield Case("gelu_quantize", "quantization", (hidden, kind), note)
    sums, rows, columns = (hidden * 1000).int(), drawn(size.tokens, 1).float().abs(), hidden[0].float().abs()
    yield Case("rescale", "quantization", (sums, rows, columns, hidden[1], dtype))
    for stage in size.stages:
        clip = drawn(1, *stage).contiguous(memory_format=torch.channels_last_3d)
        bend = drawn(1, 4, stage[0]).unbind(1)[:2]
        yield Case("pixel_norm_modulate_silu", "vae", (clip, *bend), f"{stage[0]} channels")
        yield Case("bias_residual", "vae", (clip, bend[0][0], clip), f"{stage[0]} channels")
    for name in fused.GGML_KERNEL_TYPES:
        yield Case("dequantize", "ggml", packed(name, size.outputs, width, device, dtype), name)


def packed(name: str, rows: int, columns: int, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random bytes of a format with scales that are numbers, and where what they stand for goes."""
    packing = GGML_TYPES[name]
    blocks = torch.randint(0, 256, (rows, columns // packing.block_size, packing.type_size), dtype=torch.uint8)
    for start in {"Q8_0": (0,), "Q6_K": (208,), "Q4_K": (0, 2)}[name]:
        blocks[..., start + 1] &= 0x3B  # below 1, and no infinity
    return blocks.flatten(1).to(device), packing, torch.empty(rows, columns, dtype=dtype, device=device)


def kinds_here() -> tuple[torch.dtype, ...]:
    """Of 8 bits, those that the CUDA device can round to."""
    return EIGHT_BITS if fp8.has_fp8_units(torch.device("cuda")) else EIGHT_BITS[:1]


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """The median of some runs on the current CUDA device, each with cold caches."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for _ in range(WARM):
        run(*arguments)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        run(*arguments)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def numbers(made: Any) -> list[Tensor]:
    """The tensors that came out, in fp32; codes times their scales."""
    if isinstance(made, Tensor):
        return [made.float()]
    if made[-2].dtype in EIGHT_BITS:
        return [*(tensor.float() for tensor in made[:-2]), made[-2].float() * made[-1]]
    return [tensor.float() for tensor in made]


def wide(argument: Any) -> Any:
    """A tensor of narrow floats in fp32, and fp32 in the place of their dtype."""
    narrow = (torch.bfloat16, torch.float16)
    if isinstance(argument, Tensor):
        return argument.float() if argument.dtype in narrow else argument
    return torch.float32 if argument in narrow else argument


def exact(case: Case) -> list[Tensor]:
    """What the definition gives in fp32. Numbers that were not rounded on the way may become other codes."""
    return numbers(case.definition(*map(wide, case.arguments)))


def apart(made: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative error of the tensors."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(made, right, strict=True))


def measured(case: Case, size: Size) -> Row:
    """The kernel beside its definition."""
    right, made = exact(case), case.kernel(*case.arguments)
    errors = [apart(numbers(one), right) for one in (case.definition(*case.arguments), made)]
    tensors = [*case.arguments, *(made if isinstance(made, tuple) else (made,))]
    moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors if isinstance(t, Tensor)}.values())
    plain, fast = (seconds(run, *case.arguments) for run in (case.definition, case.kernel))
    name = f"{case.name}, {case.note}" if case.note else case.name
    return Row(name, size.name, plain, fast, moved / fast / 1e9, *errors)


def attentions(size: Size) -> Iterator[Row]:
    """Attention among the tokens, and to the text, with a bias and without."""
    chooser = attention.autotuner_for(torch.device("cuda"))
    for keys, biased in ((size.tokens, False), (size.text, False), (size.text, True)):
        shapes = ((1, length, size.heads, size.width // size.heads) for length in (size.tokens, keys, keys))
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes)
        given = (q, k, v, torch.zeros(1, 1, 1, keys, device="cuda", dtype=torch.bfloat16) if biased else None)
        plain = seconds(attention.torch_sdpa, *given)
        for candidate in chooser.candidates:
            outcome = chooser.try_candidate(candidate, *given)
            if isinstance(outcome, str):
                print(f"{candidate.name}, {keys} keys: {outcome}", file=sys.stderr)
                continue
            name = f"attention by {candidate.name}, {keys} keys{', bias' if biased else ''}"
            spent = seconds(candidate.run, *given)
            errors = (attention.relative_error(run(*given), *given) for run in (attention.torch_sdpa, candidate.run))
            yield Row(name, size.name, plain, spent, 4 * size.tokens * keys * size.width / spent / 1e12, *errors)


def products(size: Size) -> Iterator[Row]:
    """The way up of the feed-forward in 8 bits, beside bfloat16. Their error is by design."""
    shapes = ((size.tokens, size.width), (4 * size.width, size.width))
    x, weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    right, plain = [x.float() @ weight.float().t()], seconds(F.linear, x, weight)
    plain_error, work = apart([F.linear(x, weight).float()], right), 2 * right[0].numel() * size.width
    for run, kind in ((int8.linear, torch.int8), (fp8.linear, torch.float8_e4m3fn)):
        if kind in kinds_here():
            codes, scale = reference.quantize_rows(weight, kind)
            given = (x, codes, scale.flatten(), None)
            spent, error = seconds(run, *given), apart([run(*given).float()], right)
            yield Row(f"linear in {kind}", size.name, plain, spent, work / spent / 1e12, plain_error, error)


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines: list[tuple[str, ...]] = [HEAD, ("---",) * len(HEAD)]
    for row in rows:
        spent = (f"{row.plain * 1e6:.1f}", f"{row.fast * 1e6:.1f}", f"{row.plain / row.fast:.2f}", f"{row.rate:.0f}")
        lines.append((row.name, row.size, *spent, f"{row.plain_error:.1e}", f"{row.fast_error:.1e}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--size", choices=[size.name for size in SIZES], action="append", help="default: all")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("the kernels run on a GPU, and torch finds no CUDA device here.")
    rows: list[Row] = []
    with torch.inference_mode():
        for size in SIZES:
            if size.name in (asked.size or [size.name]):
                rows += [measured(case, size) for case in cases(size, "cuda", kinds=kinds_here())]
                rows += [*attentions(size), *products(size)]
    print(table(rows))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps({**machine, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
