"""Placements of the text encoder (T5): resident, or streamed block by block."""

from __future__ import annotations

from kadr.checkpoints.source import Source
from kadr.planning import backends
from kadr.planning.costs import activations
from kadr.planning.costs.weight_bytes import weight_bytes
from kadr.planning.options.context import StageContext, WeightOption
from kadr.planning.placement import AS_STORED, CONVERTED, StageOptions
from kadr.planning.timing.transformer import text_encoder_seconds
from kadr.planning.timing.weights import weight_seconds
from kadr.spec.model import TEXT_ENCODER
from kadr.spec.offload import OFFLOAD_BLOCKS, OFFLOAD_NONE
from kadr.spec.weights import can_stay_stored

MIN_STREAM_BYTES = 500_000_000  # a text encoder of no more bytes is not worth streaming


def text_options(context: StageContext) -> StageOptions:
    checkpoint = context.spec.text_encoder_checkpoint
    tokens, calibration = context.workload.tokens_to_encode, context.calibration
    workspace_bytes = activations.text_encoder_activation_bytes(
        checkpoint.config, context.itemsize, length=max(tokens), padded_length=activations.MAX_PROMPT_TOKENS
    )
    placements = []
    for option in _weight_options(context, checkpoint.source):
        weights = weight_bytes(checkpoint.source, context.dtype, option.weight_format, is_text_encoder=True)
        # Never prepacked, as a streamed module: it runs once.
        backend = backends.matmul_backend(context.dtype, context.device, option.weight_format, is_streamed=True)
        times = weight_seconds(
            calibration,
            checkpoint.source,
            context.dtype,
            option.weight_format,
            device=context.device,
            is_streamed=option.is_streamed,
        )
        seconds = text_encoder_seconds(calibration, checkpoint.config, tokens, times.per_use)
        placements.append(
            context.placement(option, weights, workspace_bytes, backend, seconds=seconds, load_seconds=times.load)
        )
    return StageOptions(stage="text", component=TEXT_ENCODER, placements=tuple(placements))


def _weight_options(context: StageContext, source: Source) -> list[WeightOption]:
    """Decides whether the text encoder (T5) is streamed block by block, resident, or either.

    Above `MIN_STREAM_BYTES` it is always streamed on a CPU, and on a GPU if it does not fit or offload is "blocks".
    A smaller one is streamed only if it does not fit. Offload "none" keeps it resident.
    """
    weight_format = AS_STORED if can_stay_stored(source, context.device) else CONVERTED
    streamed = WeightOption(
        weight_format, is_streamed=True, reason="the text encoder is streamed block by block, once per prompt"
    )
    resident = WeightOption(CONVERTED)
    offload = context.spec.offload
    if offload == OFFLOAD_NONE or source.size_bytes <= MIN_STREAM_BYTES:
        return [resident, streamed] if offload != OFFLOAD_NONE else [resident]
    # On a CPU streaming is free: the system keeps the pages of the file in its cache.
    return [streamed] if context.on_cpu or offload == OFFLOAD_BLOCKS else [resident, streamed]
