"""Parameter counts of each component, from its config alone.

Weights of the linear layers in blocks, which may be quantized or streamed, are counted apart from all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.nn.timestep_embedding import SINUSOID_WIDTH


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameter counts of a component.

    Args:
        num_blocks: transformer blocks.
        linear_per_block: parameters in the linear weights of one block.
        other_per_block: parameters in its biases, norms and tables.
        outside_blocks: parameters outside of the blocks.
    """

    num_blocks: int = 0
    linear_per_block: int = 0
    other_per_block: int = 0
    outside_blocks: int = 0

    @property
    def linear(self) -> int:
        """Parameters in the linear weights of all blocks."""
        return self.num_blocks * self.linear_per_block

    @property
    def other(self) -> int:
        """All other parameters."""
        return self.num_blocks * self.other_per_block + self.outside_blocks

    @property
    def total(self) -> int:
        """All parameters."""
        return self.linear + self.other

    def bytes(self, itemsize: float, linear_itemsize: float | None = None) -> int:
        """Returns the bytes of all parameters.

        Args:
            itemsize: bytes per number.
            linear_itemsize: bytes per number in the linear weights of blocks, if quantized: 0.5625 for Q4_K.
        """
        return math.ceil(
            self.linear * (itemsize if linear_itemsize is None else linear_itemsize) + self.other * itemsize
        )

    def block_bytes(self, itemsize: float, linear_itemsize: float | None = None) -> int:
        """Returns the bytes of one block, with the arguments of `bytes`."""
        return math.ceil(
            self.linear_per_block * (itemsize if linear_itemsize is None else linear_itemsize)
            + self.other_per_block * itemsize
        )


def transformer_parameters(config: TransformerConfig) -> ParameterCounts:
    """Counts a transformer: per block two attentions of four matrices, and a feed-forward four times as wide."""
    width, channels = config.width, config.in_channels
    return ParameterCounts(
        num_blocks=config.num_layers,
        linear_per_block=(2 * 4 + 2 * 4) * width**2,
        # biases of the attentions and of the feed-forward, two norms in each attention, six rows of adaLN
        other_per_block=(2 * 4 + 4 + 1 + 2 * 2 + 6) * width,
        outside_blocks=(
            (channels + 1) * width  # proj_in
            + time_embed_parameters(width)
            + (width + 1) * 6 * width  # adaln_linear
            + (config.caption_channels + 1 + width + 1) * width  # caption_proj
            + 2 * width  # output modulation
            + (width + 1) * channels  # proj_out
        ),
    )


def text_encoder_parameters(config: T5Config) -> ParameterCounts:
    """Counts a T5 encoder: no biases, two norms per block, a gated feed-forward of three matrices."""
    inner = config.num_heads * config.d_kv
    return ParameterCounts(
        num_blocks=config.num_layers,
        linear_per_block=(4 * inner + 3 * config.d_ff) * config.d_model,
        other_per_block=2 * config.d_model,
        outside_blocks=(config.vocab_size + 1) * config.d_model
        + config.relative_attention_num_buckets * config.num_heads,
    )


def upscaler_parameters(config: UpscalerConfig) -> ParameterCounts:
    """Counts a latent upscaler: two stages of residual blocks around the upsampling convolution."""
    width, taps = config.mid_channels, 27
    upsampled = width * math.prod(config.scale_factors)
    block = 2 * ((taps * width + 1) * width + 2 * width)
    return ParameterCounts(
        outside_blocks=(
            (taps * config.in_channels + 1) * width
            + 2 * width
            + 2 * config.num_blocks_per_stage * block
            + ((taps if config.temporal_upsample else 9) * width + 1) * upsampled
            + (taps * width + 1) * config.in_channels
        )
    )


def time_embed_parameters(width: int) -> int:
    """Counts the two linear layers of a timestep embedding."""
    return (SINUSOID_WIDTH + 1 + width + 1) * width
