"""What the training of a LoRA takes, from configs and sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.models.transformer import TransformerConfig
from kadr.planning.activations import TEXT

LEARNED = 16  # bytes of a number that learns, all in fp32: itself, its gradient, and AdamW's two moments
WITHIN = 48  # rows of the model's width that one layer keeps for each token until its gradient has passed; counted
TABLES = 12  # of them more where every token has a level of its own


@dataclass(frozen=True)
class TrainingBytes:
    """Of the training of a LoRA, by what they are for.

    Args:
        weights: of the transformer, as they are held.
        learned: of the matrices that learn, with what the optimizer keeps of them.
        activations: at the worst moment.
    """

    weights: int
    learned: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.learned + self.activations


def training_bytes(
    config: TransformerConfig,
    *,
    weights: int,
    parameters: int,
    tokens: int,
    batch: int,
    size: int,
    recomputed: bool,
) -> TrainingBytes:
    """What the training of a LoRA takes.

    Args:
        weights: bytes of the transformer's, as they are held.
        parameters: numbers that learn.
        tokens: of one example, with those of its reference.
        size: bytes of a number that is computed with.
        recomputed: each layer is computed again for its gradient, from what it was given.
    """
    row = batch * tokens * config.width * size
    text = batch * TEXT * config.width * size
    within = (WITHIN + TABLES) * row
    read = config.num_layers * 4 * text  # keys and values of the text, and what came before them
    layers = config.num_layers * row + within if recomputed else config.num_layers * within
    return TrainingBytes(
        weights=weights,
        learned=parameters * LEARNED,
        activations=read + layers,
    )
