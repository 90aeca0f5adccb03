"""What the training of a LoRA takes, from configs and sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.models.transformer import TransformerConfig
from kadr.planning.activations import MAX_PROMPT_TOKENS

BYTES_PER_TRAINABLE_PARAMETER = (
    16  # bytes of a number that learns, all in fp32: itself, its gradient, and AdamW's two moments
)
SAVED_ROWS_PER_BLOCK = (
    48  # rows of the model's width that one layer keeps for each token until its gradient has passed; counted
)
SAVED_ADALN_ROWS = 12  # of them more where every token has a level of its own


@dataclass(frozen=True)
class TrainingBytes:
    """Of the training of a LoRA, by what they are for.

    Args:
        weights: of the transformer, as they are held.
        trainable: of the matrices that learn, with what the optimizer keeps of them.
        activations: at the worst moment.
    """

    weights: int
    trainable: int
    activations: int

    @property
    def total(self) -> int:
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
    """What the training of a LoRA takes.

    Args:
        weight_bytes: bytes of the transformer's, as they are held.
        trainable_parameters: numbers that learn.
        tokens: of one example, with those of its reference.
        itemsize: bytes of a number that is computed with.
        gradient_checkpointing: each layer is computed again for its gradient, from what it was given.
    """
    row = batch * tokens * config.width * itemsize
    text = batch * MAX_PROMPT_TOKENS * config.width * itemsize
    within = (SAVED_ROWS_PER_BLOCK + SAVED_ADALN_ROWS) * row
    read = config.num_layers * 4 * text  # keys and values of the text, and what came before them
    layers = config.num_layers * row + within if gradient_checkpointing else config.num_layers * within
    return TrainingBytes(
        weights=weight_bytes,
        trainable=trainable_parameters * BYTES_PER_TRAINABLE_PARAMETER,
        activations=read + layers,
    )
