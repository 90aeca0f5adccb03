"""Placements of the VAE encoder and decoder, and of the upscalers between two passes."""

from __future__ import annotations

from dataclasses import replace

import torch

from kadr.kernels.cpu.winograd import F23, F43
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.planning import backends
from kadr.planning.costs import activations
from kadr.planning.costs.flops import upscaler_flops
from kadr.planning.costs.vae_activations import vae_decode_activation_bytes, vae_encode_activation_bytes
from kadr.planning.costs.vae_flops import vae_decoder_flops, vae_encoder_flops
from kadr.planning.costs.weight_bytes import WeightBytes, weight_bytes
from kadr.planning.options.context import StageContext, WeightOption
from kadr.planning.placement import CONVERTED, Placement, StageOptions
from kadr.quant.prepack import should_prepack_convs
from kadr.spec.model import UPSCALERS, VAE_DECODER, VAE_ENCODER

# Decoding time by `winograd_frames`, against convolutions without Winograd. Measured.
WINOGRAD_TIME_RATIO = {0: 1.0, F23: 0.75, F43: 0.6}
# Decoded frames on their way into a file: the video encoder itself; copies of a chunk in float32, as it is scaled,
# resized and converted to bytes; and the frames that the encoder looks ahead at. Measured.
CODEC_BYTES, FRAME_COPIES, LOOKAHEAD_FRAMES, LOOKAHEAD_BYTES_PER_PIXEL = 25_000_000, 8, 60, 3


def encode_options(context: StageContext) -> StageOptions:
    config = context.spec.vae_config
    grids = [grid for grids in context.workload.encode_grids for grid in grids]
    # The encoder's convolutions compute pairs of frames: a still image is then a single product.
    winograd_frames = F23 if should_prepack_convs(context.dtype, context.device) else 0
    workspace_bytes = max(
        vae_encode_activation_bytes(config, grid, context.itemsize, winograd_frames=winograd_frames) for grid in grids
    )
    flops = sum(vae_encoder_flops(config, grid) for grid in grids)
    backend = backends.conv_backend(context.dtype, context.device)
    weights = _weight_bytes(context, "encoder", winograd_frames)
    option = WeightOption(CONVERTED, reason=_reference_reason(context))
    placement = context.placement(option, weights, workspace_bytes, flops, 0, backend)
    placement = replace(placement, winograd_frames=winograd_frames)
    return StageOptions(stage="encode", component=VAE_ENCODER, placements=(placement,))


def _reference_reason(context: StageContext) -> str:
    """Returns how many reference tokens controls add, for people; "" without controls."""
    if context.workload.windows:
        largest = max(context.workload.windows, key=lambda window: window.reference_tokens)
        pairs = [(largest.reference_tokens, largest.resolved_pass)]
    else:
        pairs = list(zip(context.workload.reference_tokens, context.workload.passes, strict=False))
    if not any(tokens for tokens, _ in pairs):
        return ""
    owner = "a window's" if context.workload.windows else "the video's"
    counts = ", ".join(f"{tokens} beside {owner} {resolved_pass.grid.num_tokens}" for tokens, resolved_pass in pairs)
    return f"the transformer also sees reference tokens of controls: {counts}"


def decode_options(context: StageContext) -> StageOptions:
    config = context.spec.vae_config
    grid, backend = context.workload.passes[-1].grid, backends.conv_backend(context.dtype, context.device)
    flops, placements = vae_decoder_flops(config, grid), []
    for chunk_frames, winograd_frames in _decode_chunkings(context):
        workspace_bytes = vae_decode_activation_bytes(
            config, grid, context.itemsize, chunk_frames=chunk_frames, winograd_frames=winograd_frames
        ) + _output_bytes(context, chunk_frames)
        reason = ""
        if chunk_frames != CHUNK_FRAMES:
            reason = f"the decoder works in chunks of {chunk_frames} latent frames"
        elif winograd_frames == F23:
            reason = "its Winograd convolutions compute 2 frames at a time"
        weights = _weight_bytes(context, "decoder", winograd_frames)
        option = WeightOption(CONVERTED, reason=reason)
        placement = context.placement(option, weights, workspace_bytes, flops, 0, backend)
        seconds = placement.seconds * WINOGRAD_TIME_RATIO[winograd_frames]
        seconds *= 1 + 0.1 * (CHUNK_FRAMES - chunk_frames)
        placements.append(
            replace(
                placement,
                chunk_frames=chunk_frames,
                winograd_frames=winograd_frames,
                seconds=seconds,
            )
        )
    return StageOptions(stage="decode", component=VAE_DECODER, placements=tuple(placements))


def _decode_chunkings(context: StageContext) -> list[tuple[int, int]]:
    """Returns pairs of `chunk_frames` and `winograd_frames` for the VAE decoder, the fastest first."""
    if not should_prepack_convs(context.dtype, context.device):
        return [(CHUNK_FRAMES, 0), (2, 0), (1, 0)]
    return [(CHUNK_FRAMES, F43), (CHUNK_FRAMES, F23), (2, F23), (1, F23)]


def _output_bytes(context: StageContext, chunk_frames: int) -> int:
    """Returns the bytes of decoded frames on their way into a file."""
    last_pass = context.workload.passes[-1]
    pixels = last_pass.size.width * last_pass.size.height
    return CODEC_BYTES + pixels * (
        FRAME_COPIES * chunk_frames * 3 * 4 + LOOKAHEAD_BYTES_PER_PIXEL * min(last_pass.frames, LOOKAHEAD_FRAMES)
    )


def _weight_bytes(context: StageContext, half: str, winograd_frames: int) -> WeightBytes:
    source = context.spec.vae_checkpoint.sources["vae"]
    infos = {name: info for name, info in source.infos.items() if name.startswith(f"{half}.")}
    return weight_bytes(replace(source, infos=infos), context.dtype, CONVERTED, winograd_frames=winograd_frames)


def upscale_options(context: StageContext) -> StageOptions:
    """Returns one placement: the weights of all upscalers, the workspace of the largest, the time of all."""
    grid, total = context.workload.passes[0].grid, Placement(dtype="float32")
    for checkpoint in context.spec.upscalers(has_two_passes=True).values():
        config, source = checkpoint.info.upscaler, checkpoint.sources["upscaler"]
        assert config is not None
        weights = weight_bytes(source, torch.float32, CONVERTED)
        workspace_bytes = activations.upscaler_activation_bytes(config, grid)
        placement = context.placement(
            WeightOption(CONVERTED), weights, workspace_bytes, upscaler_flops(config, grid), 0
        )
        total = replace(
            total,
            mapped_bytes=total.mapped_bytes + placement.mapped_bytes,
            private_bytes=total.private_bytes + placement.private_bytes,
            workspace_bytes=max(total.workspace_bytes, placement.workspace_bytes),
            seconds=total.seconds + placement.seconds,
        )
    return StageOptions(stage="upscale", component=UPSCALERS, placements=(total,))
