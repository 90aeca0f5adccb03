"""FLOPs of each component, from its config and the size of its input.

FLOPs are twice the multiplications of matrix products, convolutions and attention (performance.md, B).
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.planning.costs.activations import MAX_PROMPT_TOKENS
from kadr.planning.costs.parameters import time_embed_parameters
from kadr.sampling.settings import ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.shapes import LatentGrid


def lora_flops(parameters: int, tokens: int) -> int:
    """Returns the FLOPs of the LoRA matrices A and B of all layers, for `tokens` tokens of the video or the prompt."""
    return 2 * parameters * tokens


def transformer_flops(
    config: TransformerConfig,
    tokens: int,
    *,
    batch: int = 1,
    text_tokens: int = MAX_PROMPT_TOKENS,
    num_sigmas: int | None = None,
) -> int:
    """Returns the FLOPs of one model evaluation with the text KV cache filled.

    Args:
        text_tokens: tokens of the longest prompt.
        num_sigmas: number of distinct sigmas among the tokens; None is one for each sample.
    """
    width = config.width
    blocks = config.num_layers * _block_flops(config, tokens, text_tokens)
    projections = 2 * 2 * tokens * config.in_channels * width
    num_sigmas = batch if num_sigmas is None else num_sigmas
    return batch * (blocks + projections) + 2 * num_sigmas * (time_embed_parameters(width) - 2 * width + 6 * width**2)


def text_kv_flops(config: TransformerConfig, *, batch: int = 1, text_tokens: int = MAX_PROMPT_TOKENS) -> int:
    """Returns the FLOPs of filling the text KV cache: once for all steps."""
    width = config.width
    return batch * text_tokens * (2 * (config.caption_channels + width) + 4 * config.num_layers * width) * width


def perturbed_flops(
    config: TransformerConfig,
    tokens: int,
    blocks: Collection[int],
    mode: str,
    *,
    batch: int = 1,
    text_tokens: int = MAX_PROMPT_TOKENS,
) -> int:
    """Returns the FLOPs that STG adds: evaluating samples again from the first of the perturbed `blocks` on.

    Args:
        batch: number of perturbed samples.
        mode: STG mode; see `models.transformer.PERTURBED_VALUES`.
    """
    block_flops = _block_flops(config, tokens, text_tokens)
    saved = block_flops if mode == TRANSFORMER_BLOCK else _perturbed_attention_savings(config, tokens, mode)
    repeated = (config.num_layers - min(blocks)) * block_flops - len(set(blocks)) * saved
    return batch * (repeated + 2 * tokens * config.in_channels * config.width)


def _perturbed_attention_savings(config: TransformerConfig, tokens: int, mode: str) -> int:
    """Returns the FLOPs that a block with perturbed self-attention saves."""
    # No queries, keys or logits; no values either unless they replace the attention's output.
    num_projections = 2 if mode == ATTENTION_VALUES else 3
    return 2 * num_projections * tokens * config.width**2 + 4 * tokens**2 * config.width


def _block_flops(config: TransformerConfig, tokens: int, text_tokens: int) -> int:
    """Returns 28 N D² + 4 N² D + 4 N T D; the 4 T D² of text keys and values are in `text_kv_flops`."""
    width = config.width
    return 28 * tokens * width**2 + 4 * tokens * (tokens + text_tokens) * width


def self_attention_flops(config: TransformerConfig, tokens: int) -> int:
    """Returns the FLOPs of the logits and the outputs of self-attention in all blocks: 4 N² D each."""
    return config.num_layers * 4 * tokens**2 * config.width


def text_encoder_flops(config: T5Config, *, length: int, batch: int = 1) -> int:
    """Returns the FLOPs of encoding a prompt: 2 L (4 D I + 3 D H) + 4 L² I per block.

    I is the width of all heads (performance.md, B.3); L the length without padding, which is not computed.
    """
    inner = config.num_heads * config.d_kv
    block = 2 * length * (4 * inner + 3 * config.d_ff) * config.d_model + 4 * length**2 * inner
    return batch * config.num_layers * block


def upscaler_flops(config: UpscalerConfig, grid: LatentGrid) -> int:
    """Returns the FLOPs of upscaling latents of `grid`."""
    width, before = config.mid_channels, grid.num_tokens
    rows = prod(config.scale_factors[1:])
    after = (2 * grid.frames - 1 if config.temporal_upsample else grid.frames) * grid.height * grid.width * rows
    taps = 27 if config.temporal_upsample else 9
    return 2 * (
        27 * config.in_channels * width * (before + after)
        + 27 * width**2 * 2 * config.num_blocks_per_stage * (before + after)
        + taps * width**2 * prod(config.scale_factors) * before
    )
