"""The table of a block's time names every part, and the parts are no more than the block."""

from __future__ import annotations

import pytest
import torch

from benchmarks import layer_time
from kadr.kernels.int8 import has_int8_units
from kadr.kernels.matmul import has_bf16_units
from kadr.models.transformer import TransformerConfig

CONFIG = TransformerConfig(num_layers=1, num_heads=2, head_dim=32, caption_channels=16)


@pytest.mark.skipif(not (has_bf16_units() and has_int8_units()), reason="this CPU multiplies plain weights")
@pytest.mark.parametrize("quant", [None, "int8"])
def test_parts_are_the_block(quant: str | None) -> None:
    module = layer_time.build_block(CONFIG, quant)
    total, parts = layer_time.measure(module, 48, rounds=3)
    attention = {layer_time.SELF_ATTENTION, layer_time.CROSS_ATTENTION}
    quantization = {layer_time.QUANTIZATION} if quant else set()
    assert parts.keys() == {layer_time.PRODUCTS, layer_time.NORMS, layer_time.RESIDUAL} | attention | quantization
    assert 0 < sum(parts.values()) < 1.5 * total  # medians of a few rounds
    table = layer_time.report(CONFIG, 48, total, parts)
    assert all(f"| {name} |" in table for name in parts)
    assert torch.is_grad_enabled()
