"""Placements of the VAE encoder and decoder, and of the upscalers between two passes."""

from __future__ import annotations

from dataclasses import replace

import torch

from kadr.checkpoints.source import Source
from kadr.kernels.cpu.winograd import F23, F43
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.planning import backends
from kadr.planning.calibration import calibration as speeds
from kadr.planning.costs import activations
from kadr.planning.costs.vae_activations import vae_decode_activation_bytes, vae_encode_activation_bytes
from kadr.planning.costs.weight_bytes import WeightBytes, weight_bytes
from kadr.planning.options.context import StageContext, WeightOption
from kadr.planning.placement import CONVERTED, Placement, StageOptions
from kadr.planning.timing.vae import upscale_seconds, vae_decode_seconds, vae_encode_seconds
from kadr.planning.timing.weights import weight_seconds
from kadr.quant.prepack import should_prepack_convs
from kadr.spec.model import UPSCALERS, VAE_DECODER, VAE_ENCODER

# Kernel of convolutions by `winograd_frames`.
CONV_KERNELS = {0: speeds.PLAIN_CONV, F23: speeds.WINOGRAD_2, F43: speeds.WINOGRAD_4}
SMALL_CHUNK_COST = 0.1  # share of the decoding time that each frame less in a chunk adds. Measured.
# Chunks that save launches on a GPU, while their workspace is no larger than the bytes, or than the usual one by this.
LARGE_CHUNK_FRAMES, LARGE_CHUNK_BYTES, LARGE_CHUNK_RATIO = (64, 16), 1_000_000_000, 1.5
# Decoded frames on their way into a file: the video encoder itself; copies of a chunk in float32, as it is scaled,
# resized and converted to bytes; and the frames that the encoder looks ahead at. Measured.
CODEC_BYTES, FRAME_COPIES, LOOKAHEAD_FRAMES, LOOKAHEAD_BYTES_PER_PIXEL = 25_000_000, 8, 60, 3

# Blurring and compressing a pixel of an image, in the time of writing one of a video. Measured.
PREPARE_COST = 1.3


def encode_options(context: StageContext) -> StageOptions:
    config = context.spec.vae_config
    grids = [grid for grids in context.workload.encode_grids for grid in grids]
    # The encoder's convolutions compute pairs of frames: a still image is then a single product.
    winograd_frames = F23 if should_prepack_convs(context.dtype, context.device) else 0
    workspace_bytes = max(
        vae_encode_activation_bytes(config, grid, context.itemsize, winograd_frames=winograd_frames) for grid in grids
    )
    kernel = CONV_KERNELS[winograd_frames]
    image_kernel = speeds.WINOGRAD_IMAGE if winograd_frames else kernel
    seconds = sum(
        vae_encode_seconds(context.calibration, config, grid, image_kernel if grid.frames == 1 else kernel)
        for grid in grids
    )
    backend = backends.conv_backend(context.dtype, context.device)
    weights = _weight_bytes(context, "encoder", winograd_frames)
    option = WeightOption(CONVERTED, reason=_reference_reason(context))
    load_seconds = _load_seconds(context, "encoder", winograd_frames)
    seconds += PREPARE_COST * context.workload.prepared_pixels * context.calibration.rate(speeds.WRITE)
    placement = context.placement(option, weights, workspace_bytes, backend, seconds=seconds, load_seconds=load_seconds)
    placement = _with_prepared_media(replace(placement, winograd_frames=winograd_frames), context)
    return StageOptions(stage="encode", component=VAE_ENCODER, placements=(placement,))


def _with_prepared_media(placement: Placement, context: StageContext) -> Placement:
    """Returns the placement with the bytes that images and frames take on the host while they are prepared.

    Images are prepared before the weights are loaded, frames of a clip between two chunks of the encoder.
    """
    image_bytes, frame_bytes = context.workload.image_bytes, context.workload.frame_bytes
    if not context.on_cpu:
        return replace(placement, host_bytes=max(placement.host_bytes, image_bytes, frame_bytes))
    weight_bytes = placement.mapped_bytes + placement.private_bytes
    workspace_bytes = max(placement.workspace_bytes, image_bytes - weight_bytes, frame_bytes)
    return replace(placement, workspace_bytes=workspace_bytes)


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
    placements = []
    for chunk_frames, winograd_frames in _decode_chunkings(context):
        workspace_bytes = vae_decode_activation_bytes(
            config, grid, context.itemsize, chunk_frames=chunk_frames, winograd_frames=winograd_frames
        )
        reason = ""
        if chunk_frames < CHUNK_FRAMES:
            reason = f"the decoder works in chunks of {chunk_frames} latent frames"
        elif winograd_frames == F23:
            reason = "its Winograd convolutions compute 2 frames at a time"
        weights = _weight_bytes(context, "decoder", winograd_frames)
        option = WeightOption(CONVERTED, reason=reason)
        placement = context.placement(
            option,
            weights,
            workspace_bytes,
            backend,
            seconds=_decode_seconds(context, chunk_frames, winograd_frames),
            load_seconds=_load_seconds(context, "decoder", winograd_frames),
            buffer_bytes=_output_bytes(context, chunk_frames),
        )
        placements.append(replace(placement, chunk_frames=chunk_frames, winograd_frames=winograd_frames))
    return StageOptions(stage="decode", component=VAE_DECODER, placements=tuple(placements))


def _decode_seconds(context: StageContext, chunk_frames: int, winograd_frames: int) -> float:
    """Returns the seconds of decoding and of writing the frames into a file.

    Frames are encoded while the next ones are decoded. On a CPU both share its cores; beside a GPU the longer counts.
    """
    last_pass, calibration = context.workload.passes[-1], context.calibration
    decode = vae_decode_seconds(calibration, context.spec.vae_config, last_pass.grid, CONV_KERNELS[winograd_frames]) * (
        1 + SMALL_CHUNK_COST * max(0, CHUNK_FRAMES - chunk_frames)
    )
    pixels = last_pass.size.width * last_pass.size.height * last_pass.frames
    write = pixels * calibration.rate(speeds.WRITE)
    return decode + write if context.on_cpu else max(decode, write)


def _decode_chunkings(context: StageContext) -> list[tuple[int, int]]:
    """Returns pairs of `chunk_frames` and `winograd_frames` for the VAE decoder, the fastest first."""
    if should_prepack_convs(context.dtype, context.device):
        return [(CHUNK_FRAMES, F43), (CHUNK_FRAMES, F23), (2, F23), (1, F23)]
    large_chunks = [] if context.on_cpu else _large_chunks(context)
    return [(frames, 0) for frames in (*large_chunks, CHUNK_FRAMES, 2, 1)]


def _large_chunks(context: StageContext) -> list[int]:
    """Returns the larger chunks that a GPU is offered, the largest first.

    Each chunk launches hundreds of kernels. A workspace much larger than usual would take the place of cached modules.
    """
    config, grid = context.spec.vae_config, context.workload.passes[-1].grid

    def workspace_bytes(frames: int) -> int:
        return vae_decode_activation_bytes(config, grid, context.itemsize, chunk_frames=frames)

    limit = max(LARGE_CHUNK_BYTES, LARGE_CHUNK_RATIO * workspace_bytes(CHUNK_FRAMES))
    return [frames for frames in LARGE_CHUNK_FRAMES if workspace_bytes(frames) <= limit]


def _output_bytes(context: StageContext, chunk_frames: int) -> int:
    """Returns the bytes of decoded frames on their way into a file."""
    last_pass = context.workload.passes[-1]
    pixels = last_pass.size.width * last_pass.size.height
    return CODEC_BYTES + pixels * (
        FRAME_COPIES * chunk_frames * 3 * 4 + LOOKAHEAD_BYTES_PER_PIXEL * min(last_pass.frames, LOOKAHEAD_FRAMES)
    )


def _weight_bytes(context: StageContext, half: str, winograd_frames: int) -> WeightBytes:
    return weight_bytes(_half(context, half), context.dtype, CONVERTED, winograd_frames=winograd_frames)


def _load_seconds(context: StageContext, half: str, winograd_frames: int) -> float:
    kernel = CONV_KERNELS[winograd_frames] if winograd_frames else ""
    return weight_seconds(
        context.calibration,
        _half(context, half),
        context.dtype,
        CONVERTED,
        device=context.device,
        conv_kernel=kernel,
    ).load


def _half(context: StageContext, half: str) -> Source:
    """Returns the tensors of the VAE's "encoder" or "decoder"."""
    source = context.spec.vae_checkpoint.sources["vae"]
    return replace(source, infos={name: info for name, info in source.infos.items() if name.startswith(f"{half}.")})


def upscale_options(context: StageContext) -> StageOptions:
    """Returns one placement: the weights of all upscalers, the workspace of the largest, the time of all."""
    grid, total = context.workload.passes[0].grid, Placement(dtype="float32")
    for checkpoint in context.spec.upscalers(has_two_passes=True).values():
        config, source = checkpoint.info.upscaler, checkpoint.sources["upscaler"]
        assert config is not None
        weights = weight_bytes(source, torch.float32, CONVERTED)
        workspace_bytes = activations.upscaler_activation_bytes(config, grid)
        times = weight_seconds(context.calibration, source, torch.float32, CONVERTED, device=context.device)
        placement = context.placement(
            WeightOption(CONVERTED),
            weights,
            workspace_bytes,
            seconds=upscale_seconds(context.calibration, config, grid),
            load_seconds=times.load,
        )
        total = replace(
            total,
            mapped_bytes=total.mapped_bytes + placement.mapped_bytes,
            private_bytes=total.private_bytes + placement.private_bytes,
            workspace_bytes=max(total.workspace_bytes, placement.workspace_bytes),
            seconds=total.seconds + placement.seconds,
            load_seconds=total.load_seconds + placement.load_seconds,
        )
    return StageOptions(stage="upscale", component=UPSCALERS, placements=(total,))
