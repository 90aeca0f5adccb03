"""Measures where the time of one transformer block goes on a CPU: `python -m benchmarks.layer_time`.

A CPU computes what it is called for before the call returns, so the parts are timed by wrapping the functions that a
block calls. Prints a Markdown table with each part's time, its rate where it multiplies, and what it would take at the
machine's peak; see `kadr.bench.peak`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kadr.kernels import attention
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.models.block_inputs import BlockInputs
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.nn.norm import RMSNorm
from kadr.planning.costs.flops import self_attention_flops, transformer_flops
from kadr.quant.convert import quantize_blocks
from kadr.quant.prepack import prepack_linears

CONFIGS = {"2b": TRANSFORMER_2B, "13b": TRANSFORMER_13B}
PROMPT_TOKENS = 100
PRODUCTS, SELF_ATTENTION, CROSS_ATTENTION = "products with weights", "self-attention", "attention to the text"
QUANTIZATION, NORMS, RESIDUAL = "quantization, with norm or GELU", "norms, modulation and RoPE", "gates and residuals"
# Functions that a block calls -> the part that they belong to. Those of one part do not call each other.
PARTS = {
    "kadr.quant.prepack.linear": PRODUCTS,
    "kadr.quant.prepack.linear_gelu": PRODUCTS,
    "kadr.kernels.cpu.int8.prepacked_linear": PRODUCTS,
    "kadr.kernels.cpu.int8.quantize_rows_unsigned": QUANTIZATION,
    "kadr.kernels.cpu.int8.norm_modulate_quantize": QUANTIZATION,
    "kadr.kernels.cpu.tokens.norm_modulate": NORMS,
    "kadr.kernels.cpu.tokens.norm_rope": NORMS,
    "kadr.kernels.reference.gate_residual": RESIDUAL,
}


class PartTimer:
    """Adds up the seconds of each part of a block."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, part: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its time added to a part, or to the part that its arguments decide."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part if isinstance(part, str) else part(*arguments)] += time.perf_counter() - start
            return result

        return timed

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Times the parts while the block runs."""
        with ExitStack() as stack:
            for name, part in PARTS.items():
                module, _, function = name.rpartition(".")
                original = getattr(import_module(module), function)
                stack.enter_context(patch(name, self.wrap(part, original)))
            stack.enter_context(patch.object(attention, "attend", self.wrap(_attention_part, attention.attend)))
            yield


def _attention_part(q: Tensor, k: Tensor, *_: Any) -> str:
    return SELF_ATTENTION if q.shape[2] == k.shape[2] else CROSS_ATTENTION


def build_block(config: TransformerConfig, quant: str | None) -> Transformer:
    """Returns a transformer of one block in bfloat16 with random weights, prepacked."""
    with torch.device("meta"):
        module = Transformer(replace(config, num_layers=1))
    module = module.to_empty(device="cpu").to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)
    for layer in module.modules():
        if isinstance(layer, RMSNorm):
            layer.weight.data.fill_(1)
    if quant is not None:
        quantize_blocks(module, quant, device=torch.device("cpu"))
    prepack_linears(module)
    return module


@torch.no_grad()
def measure(module: Transformer, tokens: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Returns the median seconds of the block and of each part."""
    config, width = module.config, module.config.width
    rope = module.compute_rope(torch.rand(1, 3, tokens) * 10)
    text = module.project_text(torch.randn(1, PROMPT_TOKENS, config.caption_channels).bfloat16(), None)
    inputs = BlockInputs(text, torch.randn(1, 1, 6, width).bfloat16() * 0.1, rope)
    x = torch.randn(1, tokens, width).bfloat16()
    totals, parts = [], []
    for round_index in range(rounds + 1):
        timer = PartTimer()
        with timer.watch():
            start = time.perf_counter()
            module.blocks[0](x, inputs)
            seconds = time.perf_counter() - start
        if round_index:  # the first chooses kernels and fills the text KV cache
            totals.append(seconds)
            parts.append(timer.seconds)
    names = {name for part in parts for name in part}
    return statistics.median(totals), {name: statistics.median(part[name] for part in parts) for name in names}


def report(config: TransformerConfig, tokens: int, total: float, parts: dict[str, float]) -> str:
    """Returns a Markdown table of the parts, largest first."""
    one = replace(config, num_layers=1)
    attention_flops = self_attention_flops(one, tokens)
    flops = {
        SELF_ATTENTION: attention_flops,
        PRODUCTS: transformer_flops(one, tokens, text_tokens=PROMPT_TOKENS) - attention_flops,
    }
    rows = sorted(parts.items(), key=lambda item: -item[1])
    rows.append(("the rest", total - sum(parts.values())))
    lines = ["| part | ms | share | TFLOP/s |", "|---|---|---|---|"]
    for name, seconds in rows:
        rate = f"{flops[name] / seconds / 1e12:.2f}" if name in flops else ""
        lines.append(f"| {name} | {1000 * seconds:.1f} | {100 * seconds / total:.0f} % | {rate} |")
    return "\n".join([*lines, f"| block | {1000 * total:.1f} | | {sum(flops.values()) / total / 1e12:.2f} |"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_time", description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="2b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[640, 6144])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    tune_malloc()
    for quant in (None, "int8"):
        module = build_block(CONFIGS[options.model], quant)
        for tokens in options.tokens:
            print(f"\n{options.model}, {quant or 'bfloat16'}, {tokens} tokens\n")
            print(report(module.config, tokens, *measure(module, tokens, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
