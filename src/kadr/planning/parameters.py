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
class Weights:
    """Numbers in the weights of a part.

    Args:
        blocks: layers of a transformer that are alike.
        block_linear: in the matrices of one block.
        block_rest: in its biases, norms and tables.
        rest: outside of the blocks.
    """

    blocks: int = 0
    block_linear: int = 0
    block_rest: int = 0
    rest: int = 0

    @property
    def linear(self) -> int:
        """In the matrices of all blocks."""
        return self.blocks * self.block_linear

    @property
    def plain(self) -> int:
        """In everything else."""
        return self.blocks * self.block_rest + self.rest

    @property
    def total(self) -> int:
        return self.linear + self.plain

    def bytes(self, plain: float, linear: float | None = None) -> int:
        """Bytes of all of it.

        Args:
            plain: bytes per number.
            linear: bytes per number in the blocks' matrices, where they are stored in another way: 0.5625 for Q4_K.
        """
        return math.ceil(self.linear * (plain if linear is None else linear) + self.plain * plain)

    def block_bytes(self, plain: float, linear: float | None = None) -> int:
        """Bytes of one block. As `bytes`."""
        return math.ceil(self.block_linear * (plain if linear is None else linear) + self.block_rest * plain)


def transformer_weights(config: TransformerConfig) -> Weights:
    """Of the transformer. A block has two attentions of four matrices, and a feed-forward four times as wide."""
    width, channels = config.width, config.in_channels
    return Weights(
        blocks=config.num_layers,
        block_linear=(2 * 4 + 2 * 4) * width**2,
        # biases of the attentions and of the feed-forward, two norms in each attention, six rows of modulation
        block_rest=(2 * 4 + 4 + 1 + 2 * 2 + 6) * width,
        rest=(
            (channels + 1) * width  # patch_in
            + level_embedding(width)
            + (width + 1) * 6 * width  # level_bends
            + (config.caption_channels + 1 + width + 1) * width  # text_in
            + 2 * width  # modulation
            + (width + 1) * channels  # patch_out
        ),
    )


def text_encoder_weights(config: T5Config) -> Weights:
    """Of the text encoder: no biases, two norms per block, a gated feed-forward of three matrices."""
    inner = config.num_heads * config.d_kv
    return Weights(
        blocks=config.num_layers,
        block_linear=(4 * inner + 3 * config.d_ff) * config.d_model,
        block_rest=2 * config.d_model,
        rest=(config.vocab_size + 1) * config.d_model + config.relative_attention_num_buckets * config.num_heads,
    )


def upsampler_weights(config: UpscalerConfig) -> Weights:
    """Of a latent upscaler: two stages of residual blocks around the convolution that grows."""
    width, taps = config.mid_channels, 27
    grown = width * math.prod(config.scale_factors)
    block = 2 * ((taps * width + 1) * width + 2 * width)
    return Weights(
        rest=(
            (taps * config.in_channels + 1) * width
            + 2 * width
            + 2 * config.num_blocks_per_stage * block
            + ((taps if config.temporal_upsample else 9) * width + 1) * grown
            + (taps * width + 1) * config.in_channels
        )
    )


def level_embedding(width: int) -> int:
    """Of the two matrices that embed a noise level, and their biases."""
    return (SINUSOID_WIDTH + 1 + width + 1) * width
