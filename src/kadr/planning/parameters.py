"""How many numbers the weights of each part hold, from its config alone.

Told apart are the matrices of the blocks, which may be quantized or streamed, and all the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpsamplerConfig
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
    width, channels = config.width, config.channels
    return Weights(
        blocks=config.layers,
        block_linear=(2 * 4 + 2 * 4) * width**2,
        # biases of the attentions and of the feed-forward, two norms in each attention, six rows of modulation
        block_rest=(2 * 4 + 4 + 1 + 2 * 2 + 6) * width,
        rest=(
            (channels + 1) * width  # patch_in
            + level_embedding(width)
            + (width + 1) * 6 * width  # level_bends
            + (config.text_width + 1 + width + 1) * width  # text_in
            + 2 * width  # modulation
            + (width + 1) * channels  # patch_out
        ),
    )


def text_encoder_weights(config: T5Config) -> Weights:
    """Of the text encoder: no biases, two norms per block, a gated feed-forward of three matrices."""
    inner = config.heads * config.head_width
    return Weights(
        blocks=config.layers,
        block_linear=(4 * inner + 3 * config.hidden) * config.width,
        block_rest=2 * config.width,
        rest=(config.vocabulary + 1) * config.width + config.buckets * config.heads,
    )


def upsampler_weights(config: UpsamplerConfig) -> Weights:
    """Of a latent upscaler: two stages of residual blocks around the convolution that grows."""
    width, taps = config.width, 27
    grown = width * math.prod(config.strides)
    block = 2 * ((taps * width + 1) * width + 2 * width)
    return Weights(
        rest=(
            (taps * config.channels + 1) * width
            + 2 * width
            + 2 * config.blocks * block
            + ((taps if config.time else 9) * width + 1) * grown
            + (taps * width + 1) * config.channels
        )
    )


def level_embedding(width: int) -> int:
    """Of the two matrices that embed a noise level, and their biases."""
    return (SINUSOID_WIDTH + 1 + width + 1) * width
