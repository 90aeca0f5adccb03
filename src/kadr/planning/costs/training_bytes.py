"""Memory of LoRA training, from configs and sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.models.transformer import TransformerConfig
from kadr.planning.costs.activations import MAX_PROMPT_TOKENS

# Bytes of a trainable parameter, all in fp32: itself, its gradient, and AdamW's two moments.
BYTES_PER_TRAINABLE_PARAMETER = 16
# Rows of the model's width that one block saves per token for its gradient; counted.
SAVED_ROWS_PER_BLOCK = 48
SAVED_ADALN_ROWS = 12  # more of them, where every token has its own sigma


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of LoRA training, by use.

    Args:
        weights: weights of the transformer, as they are stored in memory.
        trainable: LoRA matrices with their gradients and the optimizer's state.
        activations: activations at the worst moment.
    """

    weights: int
    trainable: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.trainable + self.activations


def training_bytes(
    config: TransformerConfig,
    *,
    weight_bytes: int,
    trainable_parameters: int,
    tokens: int,
    batch: int,
    itemsize: int,
    gradient_checkpointing: bool,
) -> TrainingBytes:
    """Returns the bytes of LoRA training.

    Args:
        weight_bytes: bytes of the transformer's weights, as they are stored in memory.
        trainable_parameters: numbers that are trained.
        tokens: tokens of one example, with those of its reference.
        itemsize: bytes per number of the computation.
        gradient_checkpointing: each block is recomputed from its input for its gradient.
    """
    row = batch * tokens * config.width * itemsize
    text = batch * MAX_PROMPT_TOKENS * config.width * itemsize
    saved_per_block = (SAVED_ROWS_PER_BLOCK + SAVED_ADALN_ROWS) * row
    text_kv = config.num_layers * 4 * text  # keys and values of the text, and the inputs of their norms
    if gradient_checkpointing:
        blocks = config.num_layers * row + saved_per_block
    else:
        blocks = config.num_layers * saved_per_block
    return TrainingBytes(
        weights=weight_bytes,
        trainable=trainable_parameters * BYTES_PER_TRAINABLE_PARAMETER,
        activations=text_kv + blocks,
    )
