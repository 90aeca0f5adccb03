"""Building models without weights does not load torch's compiler."""

from __future__ import annotations

import subprocess
import sys

COMPILER = ("sympy", "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes")
CODE = f"""
import sys
import torch
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, Transformer
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5

with torch.device("meta"):
    Transformer(TRANSFORMER_2B)
    T5Encoder(T5Config(vocab_size=101, d_model=48, num_layers=3, num_heads=4, d_kv=8, d_ff=80))
    for config in (VAE_0_9, VAE_0_9_1, VAE_0_9_5):
        VAE(config)
print(*(name for name in {COMPILER} if name in sys.modules))
"""


def test_models_without_weights_do_not_load_the_compiler() -> None:
    """torch loads it for some operations on the meta device, at most of a second per start and 80 MB."""
    process = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    assert process.stdout.split() == []
