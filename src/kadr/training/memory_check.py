"""Checks that a training fits: the memory of its largest example against the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence

from kadr.errors import PlanError
from kadr.memory.device import free_bytes
from kadr.pipeline.engine import Engine
from kadr.planning.costs.training_bytes import TrainingBytes, training_bytes
from kadr.planning.costs.weight_bytes import weight_bytes
from kadr.planning.placement import AS_STORED, CONVERTED
from kadr.quant.weight_formats import AUTO_QUANT, NONE
from kadr.shapes import LatentGrid
from kadr.spec.weights import is_quantized
from kadr.training.dataset import Example
from kadr.training.settings import TrainingSettings
from kadr.training.trainable_lora import target_layers

CHECKPOINTING_THRESHOLD = 0.7  # share of the free memory above which gradient checkpointing is used


def base_weight_format(engine: Engine) -> str:
    """Returns the weight format of the transformer while its LoRA trains; see `planning.placement.Placement`."""
    spec = engine.spec
    if is_quantized(spec.checkpoint.sources["transformer"]):
        return AS_STORED
    return CONVERTED if spec.quant in (NONE, AUTO_QUANT) else spec.quant


def required_bytes(
    engine: Engine, settings: TrainingSettings, examples: Sequence[Example], *, gradient_checkpointing: bool
) -> TrainingBytes:
    """Returns the memory that a training takes. Args: gradient_checkpointing: see `training_bytes`."""
    spec, config = engine.spec, engine.spec.transformer_config
    weights = weight_bytes(spec.checkpoint.sources["transformer"], spec.dtype, base_weight_format(engine))
    grid = LatentGrid.for_video(settings.size.snap(), max(example.frames for example in examples))
    layers = target_layers(config, settings.target_modules)
    return training_bytes(
        config,
        weight_bytes=weights.mapped + weights.private + weights.scratch,
        trainable_parameters=sum(settings.rank * (inputs + outputs) for inputs, outputs in layers.values()),
        tokens=grid.num_tokens * (2 if settings.is_in_context else 1),
        batch=settings.batch_size,
        itemsize=spec.dtype.itemsize,
        gradient_checkpointing=gradient_checkpointing,
    )


def needs_gradient_checkpointing(engine: Engine, settings: TrainingSettings, examples: Sequence[Example]) -> bool:
    """Returns true where the activations of all blocks would not fit at once.

    Raises:
        PlanError: the training does not fit with gradient checkpointing either.
    """
    device = engine.spec.device
    free = free_bytes(device)
    if required_bytes(engine, settings, examples, gradient_checkpointing=False).total <= CHECKPOINTING_THRESHOLD * free:
        return False
    needed = required_bytes(engine, settings, examples, gradient_checkpointing=True)
    if needed.total > free:
        where = f"{free / 1e9:.1f} GB are free on {device}"
        message = f"{_describe_need(needed)}, and {where}. {_advise(settings.batch_size)}"
        raise PlanError(message, shortfall=needed.total - free)
    return True


def _describe_need(needed: TrainingBytes) -> str:
    return (
        f"training takes about {needed.total / 1e9:.1f} GB ({needed.weights / 1e9:.1f} GB of weights, "
        f"{needed.trainable / 1e9:.1f} GB of LoRA matrices, gradients and optimizer state, "
        f"{needed.activations / 1e9:.1f} GB of activations)"
    )


def _advise(batch_size: int) -> str:
    """Says how to train in less memory."""
    batch = "a smaller --batch-size, " if batch_size > 1 else ""
    return f"Use {batch}a smaller --size or fewer --frames, or quantize the base weights to 8 bits with --quant int8."
