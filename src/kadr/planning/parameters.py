"""How many numbers the weights of each part hold, from its config alone.

Told apart are the matrices of the blocks, which may be quantized or streamed, and all the rest.
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
    """Numbers in the weights of a part.

    Args:
        num_blocks: layers of a transformer that are alike.
        linear_per_block: in the matrices of one block.
        other_per_block: in its biases, norms and tables.
        outside_blocks: outside of the blocks.
    """

    num_blocks: int = 0
    linear_per_block: int = 0
    other_per_block: int = 0
    outside_blocks: int = 0

    @property
    def linear(self) -> int:
        """In the matrices of all blocks."""
        return self.num_blocks * self.linear_per_block

    @property
    def other(self) -> int:
        """In everything else."""
        return self.num_blocks * self.other_per_block + self.outside_blocks

    @property
    def total(self) -> int:
        return self.linear + self.other

    def bytes(self, itemsize: float, linear_itemsize: float | None = None) -> int:
        """Bytes of all of it.

        Args:
            itemsize: bytes per number.
            linear_itemsize: bytes per number in the blocks' matrices, where they are stored in another way: 0.5625 for Q4_K.
        """
        return math.ceil(
            self.linear * (itemsize if linear_itemsize is None else linear_itemsize) + self.other * itemsize
        )

    def block_bytes(self, itemsize: float, linear_itemsize: float | None = None) -> int:
        """Bytes of one block. As `bytes`."""
        return math.ceil(
            self.linear_per_block * (itemsize if linear_itemsize is None else linear_itemsize)
            + self.other_per_block * itemsize
        )


def transformer_parameters(config: TransformerConfig) -> ParameterCounts:
    """Of the transformer. A block has two attentions of four matrices, and a feed-forward four times as wide."""
    width, channels = config.width, config.in_channels
    return ParameterCounts(
        num_blocks=config.num_layers,
        linear_per_block=(2 * 4 + 2 * 4) * width**2,
        # biases of the attentions and of the feed-forward, two norms in each attention, six rows of modulation
        other_per_block=(2 * 4 + 4 + 1 + 2 * 2 + 6) * width,
        outside_blocks=(
            (channels + 1) * width  # patch_in
            + time_embed_parameters(width)
            + (width + 1) * 6 * width  # level_bends
            + (config.caption_channels + 1 + width + 1) * width  # text_in
            + 2 * width  # modulation
            + (width + 1) * channels  # patch_out
        ),
    )


def text_encoder_parameters(config: T5Config) -> ParameterCounts:
    """Of the text encoder: no biases, two norms per block, a gated feed-forward of three matrices."""
    inner = config.num_heads * config.d_kv
    return ParameterCounts(
        num_blocks=config.num_layers,
        linear_per_block=(4 * inner + 3 * config.d_ff) * config.d_model,
        other_per_block=2 * config.d_model,
        outside_blocks=(config.vocab_size + 1) * config.d_model
        + config.relative_attention_num_buckets * config.num_heads,
    )


def upscaler_parameters(config: UpscalerConfig) -> ParameterCounts:
    """Of a latent upscaler: two stages of residual blocks around the convolution that grows."""
    width, taps = config.mid_channels, 27
    grown = width * math.prod(config.scale_factors)
    block = 2 * ((taps * width + 1) * width + 2 * width)
    return ParameterCounts(
        outside_blocks=(
            (taps * config.in_channels + 1) * width
            + 2 * width
            + 2 * config.num_blocks_per_stage * block
            + ((taps if config.temporal_upsample else 9) * width + 1) * grown
            + (taps * width + 1) * config.in_channels
        )
    )


def time_embed_parameters(width: int) -> int:
    """Of the two matrices that embed a noise level, and their biases."""
    return (SINUSOID_WIDTH + 1 + width + 1) * width
