"""Floating-point operations of each component, from its config and the size of what it is given."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.planning.activations import TEXT
from kadr.planning.parameters import level_embedding
from kadr.sampling.settings import ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.shapes import LatentGrid


def lora_flops(parameters: int, tokens: int) -> int:
    """Of the products with A and B of all layers, for tokens or the positions of a text alike."""
    return 2 * parameters * tokens


def transformer_flops(
    config: TransformerConfig, tokens: int, *, batch: int = 1, text: int = TEXT, levels: int | None = None
) -> int:
    """Of one evaluation, where the text was read already.

    Args:
        text: positions of the longest prompt.
        levels: how many different noise levels the tokens have; None is one for each sample.
    """
    width = config.width
    layers = config.num_layers * _layer_flops(config, tokens, text)
    ends = 2 * 2 * tokens * config.in_channels * width
    levels = batch if levels is None else levels
    return batch * (layers + ends) + 2 * levels * (level_embedding(width) - 2 * width + 6 * width**2)


def reading_flops(config: TransformerConfig, *, batch: int = 1, text: int = TEXT) -> int:
    """Of reading a text: once for all steps."""
    width = config.width
    return batch * text * (2 * (config.caption_channels + width) + 4 * config.num_layers * width) * width


def disturbed_flops(
    config: TransformerConfig,
    tokens: int,
    blocks: Collection[int],
    mode: str,
    *,
    batch: int = 1,
    text: int = TEXT,
) -> int:
    """What evaluating some samples once more with `blocks` disturbed adds: from the first of them on.

    Args:
        batch: how many samples.
        mode: see `models.transformer.DISTURBED`.
    """
    width = config.width
    plain = _layer_flops(config, tokens, text)
    if mode == TRANSFORMER_BLOCK:
        saved = plain
    else:  # no queries, no keys, no logits; where values do not take their place, no values either
        saved = (4 if mode == ATTENTION_VALUES else 6) * tokens * width**2 + 4 * tokens**2 * width
    layers = (config.num_layers - min(blocks)) * plain - len(set(blocks)) * saved
    return batch * (layers + 2 * tokens * config.in_channels * width)


def _layer_flops(config: TransformerConfig, tokens: int, text: int) -> int:
    """28 N D² + 4 N² D + 4 N T D: the 4 T D² of keys and values of a text are those of reading it."""
    width = config.width
    return 28 * tokens * width**2 + 4 * tokens * (tokens + text) * width


def text_flops(config: T5Config, *, batch: int = 1, length: int = TEXT) -> int:
    """Of encoding a prompt: 2 L (4 D I + 3 D H) + 4 L² I per block, where I is the width of all heads (B.3)."""
    inner = config.num_heads * config.d_kv
    block = 2 * length * (4 * inner + 3 * config.d_ff) * config.d_model + 4 * length**2 * inner
    return batch * config.num_layers * block


def upsampler_flops(config: UpscalerConfig, grid: LatentGrid) -> int:
    """Of upscaling latents of `grid`."""
    width, before = config.mid_channels, grid.num_tokens
    rows = prod(config.scale_factors[1:])
    after = (2 * grid.frames - 1 if config.temporal_upsample else grid.frames) * grid.height * grid.width * rows
    taps = 27 if config.temporal_upsample else 9
    return 2 * (
        27 * config.in_channels * width * (before + after)
        + 27 * width**2 * 2 * config.num_blocks_per_stage * (before + after)
        + taps * width**2 * prod(config.scale_factors) * before
    )


def seconds(flops: int, rate: float, *, read: int = 0, disk_rate: float | None = None) -> float:
    """How long a stage takes.

    Args:
        rate: FLOPs per second; see `planning.calibration`.
        read: bytes of weights that come from files, at `disk_rate` bytes per second; None where they are in memory.
    """
    return flops / rate + (read / disk_rate if disk_rate else 0.0)
