"""Measures layers built of kadr's own modules: transformer blocks, self-attention and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor, nn

from kadr.kernels.attention import attend
from kadr.kernels.cpu.winograd import F23, F43
from kadr.memory.device import has_fast_int8
from kadr.models.block_inputs import BlockInputs
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.vae.blocks import ResnetBlock3D
from kadr.nn.temporal_cache import TemporalCache
from kadr.planning.calibration.calibration import (
    INT8,
    PLAIN,
    PLAIN_CONV,
    PREPACKED,
    WINOGRAD_2,
    WINOGRAD_4,
    WINOGRAD_IMAGE,
    Curve,
)
from kadr.planning.calibration.clock import Clock
from kadr.planning.costs.flops import self_attention_flops, transformer_flops
from kadr.planning.costs.vae_stages import TAPS
from kadr.quant import weight_formats
from kadr.quant.convert import quantize_blocks
from kadr.quant.prepack import prepack_convs, prepack_linears, should_prepack_convs, should_prepack_linears

M = TypeVar("M", bound=nn.Module)
TEXT_TOKENS = 64
SMALL = TransformerConfig(num_layers=1, num_heads=6, head_dim=32, caption_channels=128)  # the demo's sizes
# Configs of one block -> rows on a CPU, and on a GPU. What is measured takes most of a minute on two cores.
BLOCK_ROWS = (
    (SMALL, (16, 256, 2048), (256, 4096, 32768)),
    (replace(TRANSFORMER_2B, num_layers=1, caption_channels=128), (16, 128, 768), (256, 2048, 16384)),
    (replace(TRANSFORMER_13B, num_layers=1, caption_channels=128), (16, 192), (256, 2048, 16384)),
)
# Head dim -> heads that are measured, and tokens, on a CPU and on a GPU.
ATTENTION_HEADS, ATTENTION_TOKENS = {32: 6, 64: 4, 128: 2}, (128, 1024, 4096)
GPU_ATTENTION_HEADS, GPU_ATTENTION_TOKENS = {32: 6, 64: 32, 128: 32}, (256, 2048, 8192)
# Channels -> sides of the frames.
CONV_SIDES = {32: (32, 128), 128: (16, 64), 512: (8, 24), 1024: (6, 12)}
GPU_CONV_SIDES = {32: (32, 256), 128: (32, 256), 512: (16, 64), 1024: (8, 32)}
CONV_FRAMES = {PLAIN_CONV: 4, WINOGRAD_4: 4, WINOGRAD_2: 8, WINOGRAD_IMAGE: 1}
FEW_CHANNELS = (128, 512)  # for kernels that few layers use


@dataclass(frozen=True)
class LayerMeter:
    """Measures layers in a dtype on a device."""

    dtype: torch.dtype
    device: torch.device

    @property
    def clock(self) -> Clock:
        """The clock of the device."""
        return Clock(self.device)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def attention_curves(self) -> dict[int, Curve]:
        """Measures self-attention, by head dim and tokens."""
        heads_by_dim = GPU_ATTENTION_HEADS if self._on_gpu else ATTENTION_HEADS
        curves = {}
        for head_dim, heads in heads_by_dim.items():
            points = []
            for tokens in GPU_ATTENTION_TOKENS if self._on_gpu else ATTENTION_TOKENS:
                q, k, v = (self._randn(1, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
                seconds = self.clock.fastest(partial(attend, q, k, v))
                points.append((tokens, seconds / (4 * tokens**2 * heads * head_dim)))
            curves[head_dim] = Curve.from_points(points)
        return curves

    def block_kernels(self) -> list[str]:
        """Returns the kernels of transformer layers that this machine has."""
        has_int8 = has_fast_int8(self.device)
        can_prepack = should_prepack_linears(self.dtype, self.device)
        return [PLAIN, *[PREPACKED] * can_prepack, *[INT8] * has_int8]

    def block_curves(self, kernel: str, attention: dict[int, Curve]) -> dict[int, Curve]:
        """Measures a transformer block without self-attention, by width and rows.

        Args:
            attention: measured self-attention, whose time is subtracted.
        """
        curves = {}
        for config, cpu_rows, gpu_rows in BLOCK_ROWS:
            module, points = self._transformer(config, kernel), []
            for rows in gpu_rows if self._on_gpu else cpu_rows:
                seconds = self._block_seconds(module, rows)
                attention_flops = self_attention_flops(config, rows)
                flops = transformer_flops(config, rows, text_tokens=TEXT_TOKENS) - attention_flops
                rest = seconds - attention_flops * attention[config.head_dim].at(rows)
                points.append((rows, max(rest, seconds / 2) / flops))
            curves[config.width] = Curve.from_points(points)
        return curves

    def _block_seconds(self, module: Transformer, rows: int) -> float:
        """Returns the seconds of one block of a transformer, on so many tokens."""
        width = module.config.width
        rope = module.compute_rope(torch.rand(1, 3, rows, device=self.device))
        text = module.project_text(self._randn(1, TEXT_TOKENS, module.config.caption_channels), None)
        inputs = BlockInputs(text, self._randn(1, 1, 6, width), rope)
        block, x = module.blocks[0], self._randn(1, rows, width)
        return self.clock.fastest(lambda: block(x, inputs))

    def _transformer(self, config: TransformerConfig, kernel: str) -> Transformer:
        module = self._build(lambda: Transformer(config))
        if kernel == INT8:
            quantize_blocks(module, weight_formats.INT8, device=self.device)
        if kernel in (PREPACKED, INT8) and not self._on_gpu:
            prepack_linears(module)
        return module

    def conv_kernels(self) -> list[str]:
        """Returns the kernels of convolutions that this machine has."""
        if should_prepack_convs(self.dtype, self.device):
            return [WINOGRAD_4, WINOGRAD_2, WINOGRAD_IMAGE, PLAIN_CONV]
        return [PLAIN_CONV]

    def conv_curves(self, kernel: str) -> tuple[dict[int, Curve], float | None]:
        """Measures residual blocks of the VAE, by channels and positions of a frame.

        Returns:
            The curves, and the seconds per weight of prepacking, where the kernel is prepacked.
        """
        sides_by_channels = GPU_CONV_SIDES if self._on_gpu else CONV_SIDES
        few = kernel in (WINOGRAD_2, WINOGRAD_IMAGE) or (kernel == PLAIN_CONV and WINOGRAD_4 in self.conv_kernels())
        curves, prepack_seconds = {}, None
        for channels in FEW_CHANNELS if few else sides_by_channels:
            points = []
            for side in sides_by_channels[channels]:
                seconds, first_seconds = self._conv_seconds(kernel, channels, side)
                flops = 4 * TAPS * channels**2 * CONV_FRAMES[kernel] * side**2
                points.append((side**2, seconds / flops))
                if channels == max(FEW_CHANNELS):
                    prepack_seconds = max(first_seconds - seconds, 0.1 * first_seconds) / (2 * TAPS * channels**2)
            curves[channels] = Curve.from_points(points)
        return curves, None if kernel == PLAIN_CONV else prepack_seconds

    def _conv_seconds(self, kernel: str, channels: int, side: int) -> tuple[float, float]:
        """Returns the seconds of a residual block on frames, and those of prepacking it and running it first."""
        first, run = min((self._first_conv_run(kernel, channels, side) for _ in range(2)), key=itemgetter(0))
        return self.clock.fastest(run, warm_up=False), first

    def _first_conv_run(self, kernel: str, channels: int, side: int) -> tuple[float, Callable[[], Tensor]]:
        """Returns the seconds of prepacking a new residual block and running it, and what runs it again."""
        is_causal = kernel in (WINOGRAD_2, WINOGRAD_IMAGE)
        block = self._build(lambda: nn.ModuleList([ResnetBlock3D(channels, channels, causal=is_causal)]))
        if self._on_gpu:
            block.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        x = self._randn(1, channels, CONV_FRAMES[kernel], side, side)

        def run() -> Tensor:
            # The frames of a chunk in the middle of a video, but for a still image.
            cache = TemporalCache(is_last_chunk=True)
            return block[0](x, cache)

        def prepack_and_run() -> Tensor:
            if kernel != PLAIN_CONV:
                prepack_convs(block, winograd_frames=F43 if kernel == WINOGRAD_4 else F23)
            return run()

        return self.clock.once(prepack_and_run), run

    def _build(self, build: Callable[[], M]) -> M:
        """Builds a module of the dtype on the device, with small numbers for weights.

        Neither zeros, with which hardware is faster, nor any that overflow.
        """
        with torch.device("meta"):
            module = build().to(self.dtype)
        module = module.to_empty(device=self.device).eval().requires_grad_(False)
        for weight in module.parameters():
            weight.data.uniform_(-0.02, 0.02)
        return module

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)
