"""Activation bytes of the VAE: its stream, simulated with sizes instead of tensors.

A layer's memory while it computes, its cache for the next chunk and the chunks that wait above it depend on how far the
stream is; at its end all frames in flight come out at once. So the stream is simulated call by call, as `models.vae`
runs it, and the result is its peak.

Below, `other_bytes` are the bytes that exist while a layer runs, its input among them, besides cached frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod

from kadr.models.vae.config import Strides, VAEConfig
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.nn.conv import KERNEL_SIZE
from kadr.planning.costs import activations
from kadr.planning.costs.vae_stages import (
    CONV_OUT,
    DEPTH_TO_SPACE,
    RES_X,
    RES_X_Y,
    SPACE_TO_DEPTH,
    STRIDED_CONV,
    VAEStage,
    decoder_stages,
    encoder_stages,
)
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid

ENCODE_CHUNK_FRAMES = 8  # pixel frames per chunk of the VAE encoder
# Latent frames after which a stream is in its steady state: the deepest stage waits for 31 at most, and from there on
# the pattern repeats with every chunk. A longer stream has no higher peak.
STEADY_STATE_FRAMES = 40
WARM_UP_FRAMES = 32  # of the decoder, which takes chunks of any size
Plane = tuple[int, int]  # rows, columns


class _Ledger:
    """Bytes of all frame caches, and the peak of those and all other bytes.

    Args:
        winograd_frames: frames that prepacked convolutions of stride 1 compute at a time; 0 if they are not prepacked.
    """

    def __init__(self, *, winograd_frames: int) -> None:
        self.cached_bytes = self.peak_bytes = 0
        self.winograd_frames = winograd_frames

    def record(self, other_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self.cached_bytes + other_bytes)


class _FrameCache:
    """Frames that a layer caches for the next chunk.

    Args:
        frame_bytes: bytes of one frame.
    """

    def __init__(self, ledger: _Ledger, frame_bytes: int) -> None:
        self.ledger, self.frame_bytes, self.frames = ledger, frame_bytes, 0

    def concatenated_bytes(self, frames: int) -> int:
        """Returns the bytes of cached and new frames in one tensor; 0 with an empty cache, where nothing is copied."""
        return (self.frames + frames) * self.frame_bytes if self.frames else 0

    def store(self, frames: int, other_bytes: int) -> None:
        """Replaces the cached frames. The old ones are freed when the new ones have been copied."""
        self.ledger.record(other_bytes + frames * self.frame_bytes)
        self.ledger.cached_bytes += (frames - self.frames) * self.frame_bytes
        self.frames = frames


class _Conv:
    """A 3 x 3 x 3 convolution; see `nn.conv`.

    Args:
        channels: channels before and after.
        plane: rows and columns before.
        strides: strides over frames, rows and columns.
    """

    def __init__(
        self, ledger: _Ledger, channels: tuple[int, int], plane: Plane, itemsize: int, strides: Strides, *, causal: bool
    ) -> None:
        self.ledger, self.channels, self.plane, self.itemsize, self.causal = ledger, channels, plane, itemsize, causal
        self.temporal_stride, down, across = strides
        self.out_plane = (plane[0] // down, plane[1] // across)
        self.in_frame_bytes = channels[0] * prod(plane) * itemsize
        self.out_frame_bytes = channels[1] * prod(self.out_plane) * itemsize
        self.cache, self.has_started = _FrameCache(ledger, self.in_frame_bytes), False

    def __call__(self, frames: int, other_bytes: int, is_last: bool) -> int:
        """Returns the number of output frames for `frames` input frames."""
        padding = self.cache.frames if self.has_started else (2 if self.causal else 1) * bool(frames)
        count = padding + frames
        if is_last and not self.causal:  # the last frame is repeated, for which all are copied once more
            self.ledger.record(other_bytes + (2 * count + 1) * self.in_frame_bytes)
            count += 1
        frames_out = max(0, (count - KERNEL_SIZE) // self.temporal_stride + 1)
        padded_bytes = count * self.in_frame_bytes
        self.ledger.record(other_bytes + padded_bytes)
        if frames:
            self.has_started = True
            if not is_last:
                self.cache.store(count - frames_out * self.temporal_stride, other_bytes + padded_bytes)
        if frames_out:
            workspace_bytes = self._workspace_bytes(count, frames_out)
            self.ledger.record(other_bytes + padded_bytes + frames_out * self.out_frame_bytes + workspace_bytes)
        return frames_out

    def _workspace_bytes(self, frames: int, frames_out: int) -> int:
        """Returns the workspace of the convolution; `frames` includes the padding."""
        before, after = (frames, *self.plane), (frames_out, *self.out_plane)
        if self.ledger.winograd_frames and self.plane == self.out_plane and self.temporal_stride == 1:
            return activations.winograd_workspace_bytes(
                self.channels, before, after, self.itemsize, self.ledger.winograd_frames
            )
        return activations.conv_workspace_bytes(self.channels, before, after, self.itemsize)


class _Stage:
    """A running stage. `run` takes a number of frames and returns that of the output, and the bytes of its tensor.

    Args:
        plane: rows and columns before the stage.
        itemsize: bytes per number.
    """

    def __init__(self, ledger: _Ledger, stage: VAEStage, plane: Plane, itemsize: int, *, causal: bool) -> None:
        self.ledger, self.stage, self.causal = ledger, stage, causal
        _, down, across = stage.strides
        is_upsampling = stage.kind == DEPTH_TO_SPACE
        self.plane = (plane[0] * down, plane[1] * across) if is_upsampling else (plane[0] // down, plane[1] // across)
        self.in_frame_bytes = stage.in_channels * prod(plane) * itemsize
        self.out_frame_bytes = stage.out_channels * prod(self.plane) * itemsize
        strides = stage.strides if stage.kind == STRIDED_CONV else (1, 1, 1)  # others rearrange after stride 1
        self.convs = [
            _Conv(ledger, channels, plane, itemsize, strides, causal=causal) for channels in stage.conv_channels
        ]
        self.skip_caches = [_FrameCache(ledger, self.in_frame_bytes) for _ in self.convs[::2]]
        self.has_started = False
        self.run = self._run_function()

    def _run_function(self) -> Callable[[int, int, bool], tuple[int, int]]:
        """Returns the method that runs this kind of stage."""
        runs = {
            RES_X: self._run_res_blocks,
            RES_X_Y: self._run_res_blocks,
            DEPTH_TO_SPACE: self._run_depth_to_space,
            SPACE_TO_DEPTH: self._run_space_to_depth,
            CONV_OUT: self._run_conv_out,
        }
        return runs.get(self.stage.kind, self._run_conv)

    def _run_conv(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        frames_out = self.convs[0](frames, other_bytes, is_last)
        return frames_out, frames_out * self.out_frame_bytes

    def _run_res_blocks(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        input_bytes = 0  # the input of the first block belongs to the caller
        for skip, conv1, conv2 in zip(self.skip_caches, self.convs[::2], self.convs[1::2], strict=True):
            hidden = self._run_norm_act_conv(conv1, frames, other_bytes + input_bytes, is_last)
            hidden_bytes = hidden * conv1.out_frame_bytes
            frames_out = self._run_norm_act_conv(conv2, hidden, other_bytes + input_bytes + hidden_bytes, is_last)
            out_bytes, skip_bytes = frames_out * self.out_frame_bytes, skip.concatenated_bytes(frames)
            if not is_last:
                skip.store(skip.frames + frames - frames_out, other_bytes + input_bytes + out_bytes + skip_bytes)
            if self.stage.kind == RES_X_Y and frames_out:
                # The skip path's norm copies its input to other strides; a 1 x 1 x 1 convolution takes its output.
                norm_bytes = 2 * frames_out * self.in_frame_bytes
                self.ledger.record(other_bytes + input_bytes + skip_bytes + 2 * out_bytes + norm_bytes)
                skip_bytes = out_bytes
            self.ledger.record(other_bytes + input_bytes + skip_bytes + 2 * out_bytes)
            frames, input_bytes = frames_out, out_bytes
        return frames, input_bytes

    def _run_norm_act_conv(self, conv: _Conv, frames: int, other_bytes: int, is_last: bool) -> int:
        """Runs norm, modulation and SiLU, then the convolution, then noise."""
        x = frames * conv.in_frame_bytes
        self.ledger.record(other_bytes + (3 if self.stage.timestep_conditioning else 2) * x)
        frames_out = conv(frames, other_bytes + x, is_last)
        if self.stage.inject_noise:
            self.ledger.record(other_bytes + (2 * frames_out + 1) * conv.out_frame_bytes)
        return frames_out

    def _run_depth_to_space(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        conv_frames = self.convs[0](frames, other_bytes, is_last)
        out_bytes = conv_frames * self.convs[0].out_frame_bytes
        self.ledger.record(other_bytes + 2 * out_bytes)
        if self.stage.residual:
            skip, delayed_bytes = self.skip_caches[0], conv_frames * self.in_frame_bytes
            skip_bytes = skip.concatenated_bytes(frames)
            if not is_last:
                skip.store(skip.frames + frames - conv_frames, other_bytes + out_bytes + skip_bytes)
            self.ledger.record(other_bytes + out_bytes + skip_bytes + delayed_bytes)
            # The rearranged output, the rearranged skip, and their sum.
            self.ledger.record(other_bytes + 2 * out_bytes + delayed_bytes)
        time = self.stage.strides[0]
        dropped = time == 2 and conv_frames > 0 and not self.has_started
        self.has_started = self.has_started or conv_frames > 0
        return conv_frames * time - dropped, out_bytes  # a dropped frame is a view that hides it, and stays in memory

    def _run_space_to_depth(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        time, pending, conv = self.stage.strides[0], self.skip_caches[0], self.convs[0]
        if time == 2:
            is_doubled = bool(frames) and not self.has_started
            input_bytes = (frames + 1) * self.in_frame_bytes if is_doubled else pending.concatenated_bytes(frames)
            self.ledger.record(other_bytes + input_bytes)
            count = pending.frames + frames + is_doubled
            if not is_last:
                pending.store(count % 2, other_bytes + input_bytes)
            self.has_started, frames, other_bytes = True, count // 2 * 2, other_bytes + input_bytes
        skip_bytes = frames // time * self.out_frame_bytes
        self.ledger.record(other_bytes + frames * self.in_frame_bytes + skip_bytes)  # rearranged input, and its mean
        frames_out = conv(frames, other_bytes + skip_bytes, is_last) // time
        self.ledger.record(other_bytes + 3 * skip_bytes)  # before and after rearranging; then the sum
        return frames_out, frames_out * self.out_frame_bytes

    def _run_conv_out(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        """Runs norm, modulation, SiLU and the convolution; in the decoder, also unpatchifies to pixels."""
        x = frames * self.in_frame_bytes
        self.ledger.record(other_bytes + (3 if self.stage.timestep_conditioning else 2) * x)
        frames_out = self.convs[0](frames, other_bytes + x, is_last)
        if not self.causal:
            self.ledger.record(other_bytes + 2 * frames_out * self.out_frame_bytes)
        return frames_out, frames_out * self.out_frame_bytes


def _build_stages(
    ledger: _Ledger, stages: Sequence[VAEStage], plane: Plane, itemsize: int, *, causal: bool
) -> Iterator[_Stage]:
    for vae_stage in stages:
        stage = _Stage(ledger, vae_stage, plane, itemsize, causal=causal)
        plane = stage.plane
        yield stage


@cache
def vae_decode_activation_bytes(
    config: VAEConfig, grid: LatentGrid, itemsize: int, *, chunk_frames: int = CHUNK_FRAMES, winograd_frames: int = 0
) -> int:
    """Returns the peak bytes of `VAE.decode_stream` besides weights and latents.

    Args:
        itemsize: bytes per number: 2 or 4.
        chunk_frames: latent frames per input chunk, and the most frames that a stage passes on at a time.
        winograd_frames: frames that prepacked convolutions compute at a time; 0 if they are not prepacked.
    """
    ledger = _Ledger(winograd_frames=winograd_frames)
    stages = tuple(_build_stages(ledger, decoder_stages(config), (grid.height, grid.width), itemsize, causal=False))
    frames = min(grid.frames, max(STEADY_STATE_FRAMES, WARM_UP_FRAMES + 2 * chunk_frames))
    # The caller holds the last chunk of pixels, and its conversion to bytes, while the next one is decoded.
    caller_bytes = (itemsize + 1) * 3 * chunk_frames * SPATIAL_COMPRESSION**2 * grid.height * grid.width
    for start in range(0, frames, chunk_frames):
        is_last = start + chunk_frames >= frames
        _run_stages(ledger, stages, min(chunk_frames, frames - start), caller_bytes, chunk_frames, is_last)
    return ledger.peak_bytes + activations.KERNEL_WORKSPACE_BYTES


def _run_stages(
    ledger: _Ledger, stages: tuple[_Stage, ...], frames: int, other_bytes: int, chunk_frames: int, is_last: bool
) -> None:
    """Runs all stages chunk by chunk; a stage's output stays until all of it has come out at the end."""
    if not stages:
        return
    frames_out, size = stages[0].run(frames, other_bytes, is_last)
    starts = range(0, frames_out, chunk_frames) or range(1)
    for start in starts:
        chunk = min(chunk_frames, frames_out - start)
        _run_stages(ledger, stages[1:], chunk, other_bytes + size, chunk_frames, is_last and start == starts[-1])


@cache
def vae_encode_activation_bytes(
    config: VAEConfig,
    grid: LatentGrid,
    itemsize: int,
    *,
    chunk_frames: int = ENCODE_CHUNK_FRAMES,
    winograd_frames: int = 0,
) -> int:
    """Returns the peak bytes of `VAE.encode` besides weights and pixels.

    Args:
        grid: latent grid of the output.
        itemsize: bytes per number: 2 or 4.
        chunk_frames: pixel frames per chunk.
        winograd_frames: frames that prepacked convolutions compute at a time; 0 if they are not prepacked.
    """
    ledger = _Ledger(winograd_frames=winograd_frames)
    patches = SPATIAL_COMPRESSION // config.patch_size
    plane = (patches * grid.height, patches * grid.width)
    stages = tuple(_build_stages(ledger, encoder_stages(config), plane, itemsize, causal=True))
    frames = min(grid.video_frames, STEADY_STATE_FRAMES * TEMPORAL_COMPRESSION)
    for start in range(0, frames, chunk_frames):
        count = min(chunk_frames, frames - start)
        tensor_bytes = count * stages[0].in_frame_bytes  # the patches
        for stage in stages:
            count, tensor_bytes = stage.run(count, tensor_bytes, start + chunk_frames >= frames)
    return ledger.peak_bytes + activations.KERNEL_WORKSPACE_BYTES
